import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerCache, TransnormerConfig, TransnormerForCausalLM
from tests.support.numerics import relative_error


@pytest.fixture(params=[0, 4], ids=["states", "with rings"])
def cache(model: TransnormerForCausalLM, ids: Tensor, request: pytest.FixtureRequest) -> TransnormerCache:
    """With rings, after a step: they hold a token."""
    with torch.no_grad():
        if not request.param:
            return model(ids, use_cache=True)[CACHE]
        cache = TransnormerCache(model.config, recent_tokens=request.param)
        model(ids[:, :-1], cache=cache)
        model(ids[:, -1:], cache=cache)
    assert all(layer.recent.count.all() for layer in cache.layers)
    return cache


def memory(cache: TransnormerCache) -> int:
    tensors = [cache.positions] + [t for layer in cache.layers for t in layer.recurrent_states.values()]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@torch.no_grad()
def test_size_does_not_depend_on_the_context(model: TransnormerForCausalLM, cache: TransnormerCache) -> None:
    # [3 rows, 2 heads, 48 or 24, 24] float32, LRPE on two of three layers; positions are 3 int64.
    assert memory(cache) == 4 * 3 * 2 * 24 * (48 + 24 + 48) + 3 * 8
    for length in (1, 500, 2):
        model(torch.randint(3, 97, (3, length)), cache=cache)
        assert memory(cache) == 4 * 3 * 2 * 24 * (48 + 24 + 48) + 3 * 8
    assert cache.get_seq_length() == 593
    assert cache.get_mask_sizes(5, 0) == (598, 0)


@torch.no_grad()
def test_states_stay_where_they_are(model: TransnormerForCausalLM, cache: TransnormerCache) -> None:
    addresses = [cache.state(layer).data_ptr() for layer in range(3)] + [cache.positions.data_ptr()]
    for length in (1, 20, 1):
        model(torch.randint(3, 97, (3, length)), cache=cache)
    assert [cache.state(layer).data_ptr() for layer in range(3)] + [cache.positions.data_ptr()] == addresses


@torch.no_grad()
def test_a_copy_is_a_copy(model: TransnormerForCausalLM, cache: TransnormerCache, ids: Tensor) -> None:
    kept = copy.deepcopy(cache)
    first = model(ids[:, :1], cache=cache).logits
    model(ids[:, :30], cache=cache)
    assert kept.positions.tolist() == [90] * 3
    assert kept.get_seq_length() == 90
    assert torch.equal(model(ids[:, :1], cache=kept).logits, first)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 2, 0]), [2, 2, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_move_with_their_positions(
    model: TransnormerForCausalLM, ids: Tensor, method: str, argument: Tensor | int, rows: list[int]
) -> None:
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    mask[1, :7] = 0
    cache = model(ids, attention_mask=mask, use_cache=True)[CACHE]
    kept = copy.deepcopy(cache)
    expected = model(ids[:, :2], cache=kept).logits[rows]
    getattr(cache, method)(argument)
    assert cache.positions.tolist() == [[50, 83, 90][row] for row in rows]
    assert relative_error(model(ids[rows, :2], cache=cache).logits, expected) <= 1e-6


@torch.no_grad()
def test_rings_change_nothing_but_what_is_written(model: TransnormerForCausalLM, ids: Tensor) -> None:
    """Steps, a chunk, other rows, and steps again; the state is whole whenever it is asked for."""
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    caches = [TransnormerCache(model.config, recent_tokens=length) for length in (0, 4)]
    for cache in caches:
        model(ids, attention_mask=mask, cache=cache)
    for tokens in (*[1] * 9, 7, *[1] * 6):
        x = torch.randint(3, 97, (len(caches[0].positions), tokens))
        expected, got = (model(x, cache=cache).logits for cache in caches)
        assert relative_error(got, expected) <= 1e-6
        if tokens == 7:
            for cache in caches:
                cache.batch_repeat_interleave(2)
    plain, ringed = caches
    assert ringed.layers[0].recent.count.all()
    for layer in range(3):
        assert relative_error(ringed.state(layer), plain.state(layer)) <= 1e-6
        assert not ringed.layers[layer].recent.count.any()


def read(model: TransnormerForCausalLM, cache: TransnormerCache, ids: Tensor, *lengths: int) -> Tensor:
    """The logits of tokens that are read in pieces of these lengths."""
    return torch.cat([model(piece, cache=cache).logits for piece in ids.split(lengths, 1)], 1)


def of_inference_mode(model: TransnormerForCausalLM, ids: Tensor, recent_tokens: int) -> TransnormerCache:
    """A cache that has read 22 tokens in inference mode."""
    cache = TransnormerCache(model.config, recent_tokens=recent_tokens)
    with torch.inference_mode():
        read(model, cache, ids[:, :22], 20, 1, 1)
    return cache


@pytest.mark.parametrize("is_reordered", [False, True])
def test_rings_of_inference_mode_are_read_outside_of_it(
    model: TransnormerForCausalLM, ids: Tensor, is_reordered: bool
) -> None:
    caches = [of_inference_mode(model, ids, recent_tokens) for recent_tokens in (4, 0)]
    for cache in caches:
        if is_reordered:
            cache.reorder_cache(torch.tensor([2, 0, 0]))
    for layer in range(3):
        assert relative_error(*(cache.state(layer) for cache in caches)) <= 1e-6


@pytest.mark.parametrize("recent_tokens", [0, 4])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(
    model: TransnormerForCausalLM, ids: Tensor, recent_tokens: int, mode: Any
) -> None:
    cache = of_inference_mode(model, ids, recent_tokens)
    with mode():
        logits = read(model, cache, ids[:, 22:30], 1, 1, 5, 1)
    assert relative_error(logits[:, -1], model(ids[:, :30]).logits[:, -1]) <= 1e-5


@pytest.mark.parametrize("recent_tokens", [0, 4])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_cache_of_inference_mode_may_be_forgotten_outside_of_it(
    model: TransnormerForCausalLM, ids: Tensor, recent_tokens: int, mode: Any
) -> None:
    cache = of_inference_mode(model, ids, recent_tokens)
    with mode():
        cache.reset()
    with torch.no_grad():
        logits = read(model, cache, ids[:, :12], 10, 1, 1)
    assert relative_error(logits, model(ids[:, :12]).logits) <= 1e-5


@pytest.mark.parametrize("recent_tokens", [0, 4])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_steps_of_inference_mode_may_stand_between_others(
    model: TransnormerForCausalLM, ids: Tensor, recent_tokens: int, mode: Any
) -> None:
    """The positions are older than the states, or the rings, that inference mode made."""
    cache = TransnormerCache(model.config, recent_tokens=recent_tokens)
    with mode():
        model(ids[:, :20], cache=cache)
    with torch.inference_mode():
        model(ids[:, 20:21], cache=cache)
    with torch.no_grad():
        logits = read(model, cache, ids[:, 21:30], 1, 1, 7)
    assert relative_error(logits, model(ids[:, :30]).logits[:, 21:]) <= 1e-5


@torch.no_grad()
def test_reset_forgets_and_an_empty_cache_is_nothing(
    model: TransnormerForCausalLM, cache: TransnormerCache, ids: Tensor
) -> None:
    expected = model(ids).logits
    address = cache.state(0).data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.state(0) is None
    assert not cache.has_previous_state()
    assert torch.equal(model(ids, cache=cache).logits, expected)
    assert cache.state(0).data_ptr() == address
    assert torch.equal(model(ids, cache=TransnormerCache(model.config)).logits, expected)


def test_what_transformers_asks_of_a_cache(model: TransnormerForCausalLM, cache: TransnormerCache) -> None:
    assert (cache.batch_size, cache.is_initialized, len(cache)) == (3, True, 3)
    assert cache.get_max_length() == -1  # none
    assert cache.get_query_offset() == 90
    assert cache.has_previous_state()
    assert not cache.is_compileable
    empty = TransnormerCache(model.config)
    assert (empty.batch_size, empty.is_initialized, empty.get_seq_length()) == (-1, False, 0)
    assert not empty.has_previous_state()


@torch.no_grad()
def test_written_and_read_back(
    model: TransnormerForCausalLM, cache: TransnormerCache, ids: Tensor, tmp_path: Path
) -> None:
    torch.save(cache, tmp_path / "prefix.pt")
    read = torch.load(tmp_path / "prefix.pt", weights_only=False)
    assert torch.equal(model(ids, cache=read).logits, model(ids, cache=cache).logits)
    assert read.positions.tolist() == [180] * 3


def test_cannot_be_cropped(cache: TransnormerCache) -> None:
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(RuntimeError, match="tokens_to_remove is -2; a recurrent state cannot give tokens back"):
        cache.crop(-2)


@pytest.mark.parametrize(
    ("length", "error"), [("16", TypeError), (1.5, TypeError), (True, TypeError), (-1, ValueError), (65, ValueError)]
)
def test_rings_of_no_length_are_refused(length, error):
    with pytest.raises(error, match="recent_tokens is "):
        TransnormerCache(TransnormerConfig(), recent_tokens=length)
