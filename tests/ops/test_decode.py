"""One step over a pool of states, against a dictionary of float64 states."""

import pytest
import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention, lightning_attention_decode
from tests.support import ReferencePool, budget, relative_error

S, H, D, E = 6, 3, 8, 5

SLOTS = {
    "identity": [0, 1, 2, 3, 4, 5],
    "permuted": [3, 0, 5, 1, 2, 4],
    "reversed": [5, 4, 3, 2, 1, 0],
    "some of them": [4, 1],
    "padding first": [-1, 2, 0],
    "padding between": [5, -1, -7, 0],
    "all padding": [-1, -1, -1],
    "the first row": [0],
    "none": [],
}


def tokens(N: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, H, D).to(dtype), torch.randn(N, H, D).to(dtype), torch.randn(N, H, E).to(dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SLOTS)
def test_slots(case: str, state_dtype: torch.dtype, index_dtype: torch.dtype):
    slots = SLOTS[case]
    pool, log_decay = torch.randn(S, H, D, E).to(state_dtype), decay.alibi(H)
    before, reference = pool.clone(), ReferencePool(pool, log_decay, scale=0.5)
    q, k, v = tokens(len(slots))

    out = lightning_attention_decode(q, k, v, log_decay, pool, slots=torch.tensor(slots, dtype=index_dtype), scale=0.5)

    expected = reference.decode(q, k, v, slots)
    assert relative_error(out, expected) <= budget(torch.float32)
    assert relative_error(pool, reference.stacked()) <= budget(state_dtype)
    for slot in set(range(S)) - set(slots):
        assert torch.equal(pool[slot], before[slot]), slot
    for slot in set(range(S)) & set(slots):
        assert not torch.equal(pool[slot], before[slot]), slot
    for n, slot in enumerate(slots):
        assert bool(out[n].any()) == (slot >= 0), slot


def test_without_slots_row_i_is_sequence_i():
    pool, log_decay = torch.randn(S, H, D, E), decay.alibi(H)
    by_slots, (q, k, v) = pool.clone(), tokens(S)
    out = lightning_attention_decode(q, k, v, log_decay, pool)
    expected = lightning_attention_decode(q, k, v, log_decay, by_slots, slots=torch.arange(S))
    assert torch.equal(out, expected)
    assert torch.equal(pool, by_slots)


@pytest.mark.parametrize("kind", ["none", "zero", "strong"])
def test_decays(kind: str):
    log_decay = {"none": None, "zero": torch.zeros(H), "strong": torch.full((H,), -8.0)}[kind]
    pool, (q, k, v) = torch.randn(S, H, D, E), tokens(S)
    reference = ReferencePool(pool, log_decay)
    out = lightning_attention_decode(q, k, v, log_decay, pool)
    assert relative_error(out, reference.decode(q, k, v, range(S))) <= budget(torch.float32)
    assert relative_error(pool, reference.stacked()) <= budget(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype):
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E), decay.alibi(H), tokens(S, dtype)
    reference = ReferencePool(pool, log_decay)
    out = lightning_attention_decode(q, k, v, log_decay, pool)
    assert out.dtype == dtype
    # The state is float32 whatever the inputs are, and so is the sum.
    assert relative_error(out, reference.decode(q, k, v, range(S))) <= max(budget(dtype), budget(torch.float32))
    assert relative_error(pool, reference.stacked()) <= budget(torch.float32)


def test_a_bfloat16_state_is_rounded_once_and_after_the_output():
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E).bfloat16(), decay.alibi(H), tokens(S)
    exact = pool.float()
    out = lightning_attention_decode(q, k, v, log_decay, pool)
    assert torch.equal(out, lightning_attention_decode(q, k, v, log_decay, exact))
    assert torch.equal(pool, exact.bfloat16())


def test_padding_may_hold_anything():
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E), decay.alibi(H), tokens(3)
    for x in (q, k, v):
        x[1] = float("nan")
    pool[0] = float("nan")
    out = lightning_attention_decode(q, k, v, log_decay, pool, slots=torch.tensor([4, -1, 2]))
    assert not out[1].any()
    assert out.isfinite().all()
    assert pool[1:].isfinite().all()
    assert pool[0].isnan().all()


def test_many_steps_are_one_prefill():
    """Six sequences in reversed slots, 50 tokens each: final states and outputs of the training operation."""
    T, slots, log_decay = 50, torch.arange(S).flip(0), decay.alibi(H)
    q, k, v = torch.randn(S, T, H, D), torch.randn(S, T, H, D), torch.randn(S, T, H, E)
    start = torch.randn(S, H, D, E)
    expected, final = lightning_attention(q, k, v, log_decay, initial_state=start, output_final_state=True)
    pool = start.flip(0).contiguous()
    steps = [lightning_attention_decode(q[:, t], k[:, t], v[:, t], log_decay, pool, slots=slots) for t in range(T)]
    assert relative_error(torch.stack(steps, 1), expected) <= 1e-6
    assert relative_error(pool.flip(0), final) <= 1e-6


def test_views_of_one_projection():
    pool, log_decay = torch.randn(S, H, D, D), decay.alibi(H)
    q, k, v = torch.randn(S, 3, H, D).unbind(1)
    assert not q.is_contiguous()
    same = pool.clone()
    out = lightning_attention_decode(q, k, v, log_decay, pool)
    expected = lightning_attention_decode(q.contiguous(), k.contiguous(), v.contiguous(), log_decay, same)
    assert torch.equal(out, expected)
    assert torch.equal(pool, same)
