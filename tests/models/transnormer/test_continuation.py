"""A sequence read in pieces is the sequence."""

import copy

import pytest
import torch
from torch import Tensor

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerCache, TransnormerForCausalLM
from tests.support.numerics import relative_error


@pytest.mark.parametrize("grad", [False, True])
def test_pieces_then_single_tokens_equal_one_prefill(model: TransnormerForCausalLM, grad: bool) -> None:
    ids = torch.randint(3, 97, (2, 1 + 7 + 64 + 1000 + 4))
    with torch.set_grad_enabled(grad):
        whole = model(ids, use_cache=True)
        cache, logits = None, []
        for piece in ids.split([1, 7, 64, 1000, 1, 1, 1, 1], dim=1):
            out = model(piece, cache=cache, use_cache=True)
            cache = out[CACHE]
            logits.append(out.logits)
    assert relative_error(torch.cat(logits, 1), whole.logits) <= 1e-5
    for layer in range(3):
        assert relative_error(cache.state(layer), whole[CACHE].state(layer)) <= 1e-5
    assert cache.positions.tolist() == whole[CACHE].positions.tolist() == [1076, 1076]


def test_a_single_token_is_the_same_in_place_and_not(model: TransnormerForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        in_place = model(ids[:, :-1], use_cache=True)[CACHE]
        other = copy.deepcopy(in_place)
        stepped = model(ids[:, -1:], cache=in_place).logits
    with torch.enable_grad():
        mixed = model(ids[:, -1:], cache=other).logits
    assert relative_error(stepped, mixed) <= 1e-6
    assert relative_error(in_place.state(0), other.state(0)) <= 1e-6


def test_gradients_flow_through_the_cache(model: TransnormerForCausalLM, ids: Tensor) -> None:
    weight = torch.randn(3, 90, 97)
    (model(ids).logits * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache = TransnormerCache(model.config)
    logits = torch.cat([model(piece, cache=cache).logits for piece in ids.split([40, 1, 30, 19], dim=1)], 1)
    (logits * weight).sum().backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected[name]) <= 2e-5, name


def test_a_prompt_may_be_read_without_gradients_and_the_rest_with(model: TransnormerForCausalLM, ids: Tensor) -> None:
    weight = torch.randn(3, 50, 97)
    with torch.no_grad():
        prompt = model(ids[:, :40], use_cache=True)[CACHE]
    once = model(ids[:, 40:], cache=copy.deepcopy(prompt)).logits
    expected = torch.autograd.grad((once * weight).sum(), model.model.layers[0].token_mixer.qkvu_proj.weight)[0]
    pieces = [model(piece, cache=prompt).logits for piece in ids[:, 40:].split([20, 30], dim=1)]
    actual = torch.autograd.grad(
        (torch.cat(pieces, 1) * weight).sum(), model.model.layers[0].token_mixer.qkvu_proj.weight
    )[0]
    assert relative_error(actual, expected) <= 2e-5


def test_without_the_cache_a_continuation_is_another_text(model: TransnormerForCausalLM, ids: Tensor) -> None:
    assert relative_error(model(ids[:, 50:]).logits, model(ids).logits[:, 50:]) > 0.05


def test_training_returns_no_cache_unless_asked(model: TransnormerForCausalLM, ids: Tensor) -> None:
    assert model(ids).get(CACHE) is not None
    assert model(ids, use_cache=False).get(CACHE) is None
    model.train()
    assert model(ids).get(CACHE) is None
    assert model(ids, use_cache=True).get(CACHE) is not None


def test_another_kind_of_cache_is_refused(model: TransnormerForCausalLM, ids: Tensor) -> None:
    from transformers import DynamicCache

    with pytest.raises(TypeError, match="cache is a DynamicCache; it must be a TransnormerCache"):
        model(ids, cache=DynamicCache())
