"""What from_pretrained, casts, initialisation and checkpointing leave of a model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_attention import decay
from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from tests.support.numerics import relative_error


def assert_decays(model: TransnormerForCausalLM) -> None:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        expected = decay.transnormer(model.config.decoder_attention_heads, i, len(layers))
        assert layer.token_mixer.log_decay.dtype == torch.float32
        assert torch.equal(layer.token_mixer.log_decay, expected)


def test_bfloat16_keeps_decays_and_frequencies(model: TransnormerForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = TransnormerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_decays(loaded)
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    assert {n for n, dtype in dtypes.items() if dtype == torch.float32} == {n for n in dtypes if n.endswith("theta")}
    assert relative_error(loaded(ids).logits, model(ids).logits) <= 0.05
    assert_decays(copy.deepcopy(model).to(torch.bfloat16))
    assert_decays(copy.deepcopy(model).half())


def test_built_on_the_meta_device(model: TransnormerForCausalLM, ids: Tensor) -> None:
    with torch.device("meta"):
        empty = TransnormerForCausalLM(model.config)
    empty.to_empty(device="cpu")
    assert_decays(empty)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


def test_initial_weights() -> None:
    config = TransnormerConfig(vocab_size=2000, decoder_embed_dim=128, decoder_layers=2, glu_dim=256)
    model = TransnormerForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("theta"):
            exponents = -2 * torch.arange(128, dtype=torch.float64) / 128
            torch.testing.assert_close(p.flatten().double(), 10000**exponents, rtol=1e-5, atol=0)
            continue
        assert abs(p.std().item() - 0.02) < 0.001, name
        assert abs(p.mean().item()) < 0.001, name
    assert model.model.embed_tokens.weight[0].eq(0).all()
    assert model.lm_head.weight[0].ne(0).any()
    assert_decays(model)
    other = TransnormerForCausalLM(TransnormerConfig(**{**config.to_dict(), "init_std": 0.1}))
    assert abs(other.lm_head.weight.std().item() - 0.1) < 0.005


def test_the_padding_row_gets_no_gradient(model: TransnormerForCausalLM, ids: Tensor) -> None:
    ids[:, :3] = 0
    model(ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient[0].eq(0).all()
    assert gradient[3:].ne(0).any()


def test_the_scale_is_part_of_the_embedding(model: TransnormerForCausalLM, ids: Tensor) -> None:
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(embedded, 32**0.5 * model.model.embed_tokens.weight[ids])
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_tied_head(ids: Tensor, tmp_path: Path) -> None:
    config = TransnormerConfig(
        vocab_size=97, decoder_embed_dim=32, decoder_layers=2, glu_dim=8, tie_word_embeddings=True
    )
    model = TransnormerForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    reloaded = TransnormerForCausalLM.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_vocabulary_can_grow(model: TransnormerForCausalLM, ids: Tensor) -> None:
    before = model(ids).logits
    model.resize_token_embeddings(103, mean_resizing=False)
    assert torch.equal(model(ids).logits[..., :97], before)
    assert model(torch.full((1, 2), 102), labels=torch.full((1, 2), 102)).logits.shape == (1, 2, 103)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(model: TransnormerForCausalLM, ids: Tensor, use_reentrant: bool) -> None:
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    calls = []
    model.model.layers[1].token_mixer.register_forward_hook(lambda *_: calls.append(1))
    # transformers 5.17 has the older name alone.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": use_reentrant})
    out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert len(calls) == 2  # once more, in the backward pass
    assert out.get(CACHE) is None
    for parameter, p in model.named_parameters():
        assert torch.equal(p.grad, expected[parameter])
    cache = model.eval()(ids)[CACHE]
    with pytest.raises(ValueError, match="cache is given; gradient checkpointing"):
        model.train()(ids, cache=cache)


def test_loss_is_the_mean_over_shifted_labels(model: TransnormerForCausalLM, ids: Tensor) -> None:
    labels = ids.clone()
    labels[:, 50:] = -100
    out = model(ids, labels=labels)
    scores = out.logits.double().log_softmax(-1)[:, :49]
    expected = -scores.gather(-1, ids[:, 1:50, None]).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)
    summed = model(ids, labels=labels, num_items_in_batch=100).loss  # how Trainer accumulates over batches
    torch.testing.assert_close(summed.double(), expected * 3 * 49 / 100, rtol=1e-6, atol=0)


def test_logits_to_keep_and_tuples(model: TransnormerForCausalLM, ids: Tensor) -> None:
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, logits[:, [0, 7]])
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], logits)


def test_takes_ids_or_embeddings_not_both(model: TransnormerForCausalLM, ids: Tensor) -> None:
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given"):
            model(**arguments)
