"""What a forward pass takes, under every name that transformers has for it, and what it refuses."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DataCollatorWithFlattening, DynamicCache
from transformers.utils import logging as transformers_logging

from lightning_attention.integrations.minimax import LightningMiniMaxCache, apply_lightning_attention
from lightning_attention.models.arguments import CACHE, UNUSED
from lightning_attention.models.transnormer import TransnormerCache, TransnormerConfig, TransnormerForCausalLM
from tests.integrations.conftest import build
from tests.support import relative_error

FIXED = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def transnormer(layers: int = 3) -> TransnormerForCausalLM:
    config = TransnormerConfig(
        vocab_size=97, decoder_embed_dim=32, decoder_layers=layers, decoder_attention_heads=2, glu_dim=40
    )
    model = TransnormerForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def minimax():
    model = build("7:1")
    apply_lightning_attention(model)
    return model


@pytest.fixture(params=[transnormer, minimax], ids=["transnormer", "minimax"])
def model(request):
    return request.param()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 33))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers logs meanwhile; what it says once a process, it says again."""
    logger = transformers_logging.get_logger("transformers")
    type(logger).warning_once.cache_clear()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_text_is_the_same_with_and_without_the_cache(model, ids, said):
    """transformers 5.24 hands it over by another name. Warnings are errors, and nothing old is logged either."""
    mask = torch.ones_like(ids)
    wanted = model.generate(ids, attention_mask=mask, use_cache=False, **FIXED)
    assert torch.equal(model.generate(ids, attention_mask=mask, **FIXED), wanted)
    out = model(ids, use_cache=True)
    assert out[CACHE] is not None
    following = model(wanted[:, 33:34], use_cache=True, **{CACHE: out[CACHE]}).logits
    assert relative_error(following[:, -1], model(wanted[:, :34]).logits[:, -1]) < 1e-5
    assert not [line for line in said if "past_key_values" in line or "deprecated" in line]


def test_either_name_is_taken(ids):
    model = transnormer()
    wanted = model(ids).logits[:, 20:]
    for name in ("cache", "past_key_values"):
        cache = TransnormerCache(model.config)
        model(ids[:, :20], **{name: cache})
        assert relative_error(model(ids[:, 20:], **{name: cache}).logits, wanted) < 1e-5

    with pytest.raises(ValueError, match="cache and past_key_values are both given"):
        model(ids, cache=cache, past_key_values=cache)


def test_generate_goes_on_from_a_cache_named_so_in_every_version(ids):
    model = transnormer()
    with torch.no_grad():
        prefix = model(ids[:, :20], use_cache=True)[CACHE]
    assert torch.equal(model.generate(ids, cache=prefix, **FIXED), model.generate(ids, **FIXED))


@pytest.mark.parametrize("value", [None, 1])
@pytest.mark.parametrize("name", ["past_keys", "labels_", "cache_params", "attention_masks", "cu_seqlen"])
def test_a_keyword_that_nobody_knows(model, ids, name, value):
    with pytest.raises(TypeError, match=rf"{type(model).__name__}.*unexpected keyword argument '{name}'|'{name}'"):
        model(ids, **{name: value})
    parts = [model.model] if isinstance(model, TransnormerForCausalLM) else []
    for part in parts:
        with pytest.raises(TypeError, match=rf"TransnormerModel.forward\(\) got an unexpected .* '{name}'"):
            part(ids, **{name: value})


def test_a_keyword_that_nobody_knows_is_named_with_its_class(ids):
    with pytest.raises(TypeError, match=r"^TransnormerForCausalLM.forward\(\) got an unexpected .*'past_keys'$"):
        transnormer()(ids, past_keys=None)
    with pytest.raises(TypeError, match=r"^LightningMiniMaxAttention.forward\(\) got an unexpected .*'past_keys'$"):
        minimax()(ids, past_keys=None)
    with pytest.raises(ValueError, match="past_keys"):  # generate() looks itself
        transnormer().generate(ids, past_keys=3, **FIXED)


@pytest.mark.parametrize("name", sorted(UNUSED))
def test_what_transformers_hands_to_every_model_changes_nothing(ids, name):
    model = transnormer()
    value = {"is_causal": True, "num_items_in_batch": torch.tensor(64), "token_type_ids": torch.zeros_like(ids)}
    value["skip_logits"] = False  # without labels there would be nothing left
    assert torch.equal(model(ids, **{name: value.get(name, 1)}).logits, model(ids).logits)
    assert torch.equal(model.model(ids, **{name: None})[0], model.model(ids)[0])


def test_what_would_change_something_is_refused(ids):
    model = transnormer()
    with pytest.raises(ValueError, match="is_causal is False"):
        model(ids, is_causal=False)
    with pytest.raises(TypeError, match=r"output_hidden_states is \[1\]; it must be True or False"):
        model(ids, output_hidden_states=[1])
    flat = DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True, return_tensors="pt")
    with pytest.raises(ValueError, match="seq_idx is given without cu_seqlens, cu_seq_lens_q or position_ids"):
        model(**flat([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]))
    with pytest.raises(ValueError, match="cu_seq_lens_k is given without cu_seqlens"):
        model(ids[:1], cu_seq_lens_k=torch.tensor([0, 20, 33]))


def test_everything_a_collator_packs_with(ids):
    model = transnormer()
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    batch = flat([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    alone = model(torch.tensor([[8, 9]])).logits
    assert relative_error(model(**batch).logits[:, 3:], alone) < 1e-5


def test_boundaries_that_minimax_would_read_across_are_refused(ids):
    with pytest.raises(TypeError, match="unexpected keyword argument 'cu_seq_lens_q'"):
        minimax()(ids[:1], cu_seq_lens_q=torch.tensor([0, 20, 33]), use_cache=False)


def test_a_cache_of_another_kind(ids):
    model, other = transnormer(), minimax()
    for name in ("cache", "past_key_values"):
        for wrong in (DynamicCache(), LightningMiniMaxCache(), ((ids, ids),)):
            with pytest.raises(TypeError, match=f"^{name} is a {type(wrong).__name__}; it must be a TransnormerCache"):
                model(ids, **{name: wrong})
    with pytest.raises(TypeError, match="is a DynamicCache; it must be a TransnormerCache"):
        model.generate(ids, **{CACHE: DynamicCache()}, **FIXED)
    with pytest.raises(TypeError, match="is a DynamicCache; it must be a MiniMaxCache"):
        other(ids, **{CACHE: DynamicCache()}, use_cache=False)
    with pytest.raises(ValueError, match="cache has 2 layers; the model has 3"):
        model(ids, cache=TransnormerCache(transnormer(2).config))


def test_a_model_that_checkpoints_its_layers_can_write(ids):
    """Without gradients nothing is checkpointed, and the cache is kept."""
    model = transnormer()
    wanted = model.generate(ids, **FIXED)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert torch.equal(model.generate(ids, **FIXED), wanted)
