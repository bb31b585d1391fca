"""What transformers expects of every causal language model, as far as it applies to one without attention maps."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM, TransnormerModel
from tests.support.numerics import relative_error


def tiny(**fields: object) -> TransnormerForCausalLM:
    sizes = {
        "vocab_size": 97,
        "decoder_embed_dim": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "glu_dim": 24,
    }
    return TransnormerForCausalLM(TransnormerConfig(**{**sizes, **fields})).eval()


def test_arguments_come_in_transformers_order() -> None:
    for cls in (TransnormerModel, TransnormerForCausalLM):
        names = list(inspect.signature(cls.forward).parameters)[1:]
        assert names[:5] == ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"]
        assert cls.main_input_name == "input_ids"
    assert TransnormerForCausalLM.can_generate()
    assert not TransnormerModel.can_generate()


def test_outputs_as_a_tuple_and_as_an_object_are_the_same(model: TransnormerForCausalLM, ids: Tensor) -> None:
    whole = model(ids, labels=ids, output_hidden_states=True)
    loss, logits, cache, hidden = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert list(whole.keys()) == ["loss", "logits", CACHE, "hidden_states"]
    assert torch.equal(loss, whole.loss)
    assert torch.equal(logits, whole.logits)
    assert cache.positions.tolist() == [90] * 3
    assert len(hidden) == model.config.num_hidden_layers + 1
    assert all(torch.equal(a, b) for a, b in zip(hidden, whole.hidden_states, strict=True))
    assert torch.equal(model.model(ids).last_hidden_state, hidden[-1])
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(hidden)


def test_embeddings_and_head_can_be_reached_and_replaced(model: TransnormerForCausalLM) -> None:
    for part in (model, model.model):
        assert part.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    other = tiny()
    model.set_input_embeddings(other.get_input_embeddings())
    model.set_output_embeddings(other.get_output_embeddings())
    assert model.model.embed_tokens is other.model.embed_tokens
    assert model.lm_head is other.lm_head
    assert model.get_decoder() is model.model
    assert model.base_model is model.model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [107, 90])
def test_vocabulary_grows_and_shrinks(ids: Tensor, tmp_path: Path, tied: bool, vocab_size: int) -> None:
    model = tiny(tie_word_embeddings=tied)
    ids = ids % 90
    before = model(ids).logits[..., :90]
    model.resize_token_embeddings(vocab_size)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == vocab_size
    assert model.lm_head.weight.shape == (vocab_size, 32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    logits = model(ids, labels=ids).logits
    assert logits.shape[-1] == vocab_size
    torch.testing.assert_close(logits[..., :90], before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(TransnormerForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.lm_head.out_features == 128


def test_the_model_loads_from_the_causal_model_and_back(ids: Tensor, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "causal")
    body = TransnormerModel.from_pretrained(tmp_path / "causal").eval()
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    again, report = TransnormerForCausalLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    assert not report["unexpected_keys"]
    assert torch.equal(again.eval().model(ids).last_hidden_state, body(ids).last_hidden_state)
    # what was missing begins as a new model's does
    assert abs(again.lm_head.weight.std().item() - 0.02) < 0.002
    assert len(again.model.layers[0].token_mixer.log_decay.unique()) == 2


def test_every_missing_weight_gets_its_initial_value(tmp_path: Path) -> None:
    model = tiny(vocab_size=2000, glu_dim=512)
    missing = {"model.layers.0.token_mixer.lrpe.theta", "model.layers.1.channel_mixer.l3.weight"}
    kept = {name: p for name, p in model.state_dict().items() if name not in missing}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded, report = TransnormerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    theta = "model.layers.0.token_mixer.lrpe.theta"
    assert torch.equal(loaded.state_dict()[theta], model.state_dict()[theta])  # by a formula
    assert abs(loaded.model.layers[1].channel_mixer.l3.weight.std().item() - 0.02) < 0.001


def test_other_sizes_are_refused_unless_asked_for(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        TransnormerForCausalLM.from_pretrained(tmp_path, vocab_size=50)
    loaded = TransnormerForCausalLM.from_pretrained(tmp_path, vocab_size=50, ignore_mismatched_sizes=True)
    assert loaded(torch.full((1, 4), 49)).logits.shape == (1, 4, 50)


def test_inputs_can_require_gradients(model: TransnormerForCausalLM, ids: Tensor) -> None:
    model.requires_grad_(False)
    model.enable_input_require_grads()
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: embedded.append(out))
    loss = model(ids, labels=ids).loss
    embedded[0].retain_grad()
    loss.backward()
    assert embedded[0].grad.ne(0).any()


@pytest.mark.parametrize("bias", [False, True])
def test_training_moves_every_parameter(ids: Tensor, bias: bool) -> None:
    model = tiny(bias=bias).train()
    model(ids, labels=ids).loss.backward()
    assert any(name.endswith("bias") for name, _ in model.named_parameters()) == bias
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.ne(0).any(), name


def test_labels_that_are_shifted_already(model: TransnormerForCausalLM, ids: Tensor) -> None:
    # What sequence parallel training hands to a model: targets aligned with the logits, whatever `labels` says.
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    loss = model(ids, labels=ids, shift_labels=shifted).loss
    assert torch.equal(loss, model(ids, labels=ids).loss)
    assert torch.equal(loss, model(ids, labels=ids.flip(1), shift_labels=shifted).loss)
    assert not torch.equal(loss, model(ids, labels=ids, shift_labels=ids).loss)


def test_two_passes_are_the_same(model: TransnormerForCausalLM, ids: Tensor) -> None:
    assert torch.equal(model(ids).logits, model(ids).logits)
    rows = torch.cat([model(row[None]).logits for row in ids])
    assert relative_error(rows, model(ids).logits) <= 1e-6
