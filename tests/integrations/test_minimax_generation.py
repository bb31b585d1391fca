"""generate() with our attention: what the original writes where it is right, and what it defines where it is not."""

import pytest
import torch

from lightning_attention.integrations.minimax import LightningMiniMaxCache
from lightning_attention.models.arguments import CACHE

NEW = 7


def generate(model, ids, mask=None, count=NEW, **kwargs):
    """Token ids; sampling from the same seed."""
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, max_new_tokens=count, **{"do_sample": False} | kwargs)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("mode", MODES)
def test_equal_text(pair, ids, layout, mode):
    original, ours = pair(layout)
    assert torch.equal(generate(ours, ids, **MODES[mode]), generate(original, ids, **MODES[mode]))
    assert torch.equal(generate(ours, ids, **MODES[mode]), generate(ours, ids, use_cache=False, **MODES[mode]))


@pytest.mark.parametrize("mode", [{}, {"num_return_sequences": 2}, {"do_sample": True, "num_beams": 2}], ids=str)
def test_beams_are_those_that_no_cache_gives(pair, ids, layout, mode):
    original, ours = pair(layout)
    kwargs = {"num_beams": 3} | mode
    assert torch.equal(generate(ours, ids, **kwargs), generate(original, ids, use_cache=False, **kwargs))


def test_the_original_does_not_reorder_its_states_with_the_beams(pair, ids):
    """Why the cache changes its class; when this fails, that has become needless."""
    original, _ = pair("linear")
    found, right = (generate(original, ids, count=12, num_beams=3, use_cache=cached) for cached in (True, False))
    assert not torch.equal(found, right)


@pytest.mark.parametrize("mode", [*MODES.values(), {"num_beams": 3}, {"prefill_chunk_size": 16}], ids=str)
def test_rings_change_no_text(pair, ids, layout, mode):
    """More tokens than a ring has, so that heads fold on the way; beams move rows while rings hold tokens."""
    _, ours = pair(layout)
    found, wanted = (
        generate(ours, ids, **mode, **{CACHE: LightningMiniMaxCache(**how)}) for how in ({"recent_tokens": 4}, {})
    )
    assert torch.equal(found, wanted)


def test_batches_with_left_padding(pair, padded, layout):
    original, ours = pair(layout)
    ids, mask = padded("left")
    found = generate(ours, ids, mask)
    assert torch.equal(found, generate(original, ids, mask, use_cache=False))
    for row in range(len(ids)):
        alone = generate(ours, ids[row : row + 1, mask[row].bool()])
        assert torch.equal(found[row, -NEW:], alone[0, -NEW:])


def test_prompts_in_chunks(pair, ids, layout):
    _, ours = pair(layout)
    found = generate(ours, ids, prefill_chunk_size=16, **{CACHE: LightningMiniMaxCache()})
    assert torch.equal(found, generate(ours, ids))


@pytest.mark.parametrize("layout", ["1:1", "7:1"])
def test_a_second_turn_goes_on_from_the_first_ones_cache(pair, ids, layout):
    _, ours = pair(layout)
    first = generate(ours, ids, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, ids[:, :9]], 1)
    found = generate(ours, turn, **{CACHE: first[CACHE]})
    assert torch.equal(found, generate(ours, turn))


def test_rows_of_the_cache(pair, ids, layout):
    """Selecting and repeating rows, and starting over."""
    _, ours = pair(layout)
    with torch.no_grad():
        wanted = ours(ids).logits
        cache = ours(ids[:, :30], use_cache=True)[CACHE]
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        found = ours(ids[rows, 30:], **{CACHE: cache}, use_cache=True).logits
        torch.testing.assert_close(found, wanted[rows, 30:], rtol=1e-4, atol=1e-4)
        cache.reset()  # the softmax layers' part of it differs between transformers' versions
    states = [state for state in cache.linear_cache if len(state)]
    assert states
    assert not any(state.any() for state in states)
