"""Packed sequences over a pool of states, against a dictionary of float64 states."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention import decay, lightning_attention_decode, lightning_attention_prefill
from tests.support import ReferencePool, budget, cumulative, relative_error

S, H, D, E = 8, 2, 8, 5


def tokens(T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(T, H, D).to(dtype), torch.randn(T, H, D).to(dtype), torch.randn(T, H, E).to(dtype)


def indices(x: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(x, dtype=dtype)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, object]:
    """Sequences in slots of their own, some of them padding or fresh, with snapshots to the slots left over."""
    N = draw(st.integers(1, 4))
    length = st.one_of(st.integers(0, 3), st.sampled_from([63, 64, 65, 128, 130]))
    rows = draw(st.permutations(range(S)))
    slots = [rows[n] if draw(st.integers(0, 4)) else -draw(st.integers(1, 3)) for n in range(N)]
    lengths = draw(st.lists(length, min_size=N, max_size=N))
    P = draw(st.integers(0, 2))
    at = [[draw(st.sampled_from([-1, 0, 1, 62, 63, 64, 65, 127, L - 1, L, L + 1])) for _ in range(P)] for L in lengths]
    targets = [[rows[N + n * P + p] if N + n * P + p < S else -1 for p in range(P)] for n in range(N)]
    return {
        "lengths": lengths,
        "slots": slots,
        "fresh": draw(st.none() | st.lists(st.booleans(), min_size=N, max_size=N)),
        "at": at,
        "targets": targets,
        "padding": draw(st.sampled_from([0, 1, 70])),
        "state_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(batches())
def test_any_batch(batch: dict):
    torch.manual_seed(batch["seed"])
    lengths, slots, fresh, at, targets = (batch[name] for name in ("lengths", "slots", "fresh", "at", "targets"))
    total = sum(lengths)
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E), decay.alibi(H), tokens(total + batch["padding"])
    for x in (q, k, v):
        x[total:] = float("nan")
    for n, slot in enumerate(slots):
        if slot >= 0 and fresh is not None and fresh[n]:
            pool[slot] = float("nan")
    pool = pool.to(batch["state_dtype"])
    before, reference = pool.clone(), ReferencePool(pool, log_decay, scale=0.5)
    pairs = [list(zip(at[n], targets[n], strict=True)) for n in range(len(lengths))]
    expected = reference.prefill(q, k, v, lengths, slots, fresh, pairs)

    index_dtype = batch["index_dtype"]
    out = lightning_attention_prefill(
        q, k, v, log_decay, pool,
        cu_seqlens=cumulative(lengths, index_dtype),
        slots=indices(slots, index_dtype),
        fresh=None if fresh is None else torch.tensor(fresh),
        scale=0.5,
        snapshot_at=indices(at, index_dtype).view(len(lengths), -1),
        snapshot_slots=indices(targets, index_dtype).view(len(lengths), -1),
    )  # fmt: skip

    assert relative_error(out, expected) <= budget(torch.float32)
    written = {slot for slot in slots if slot >= 0}
    for n, L in enumerate(lengths):
        written |= {target for a, target in pairs[n] if target >= 0 and 0 <= a <= L and slots[n] >= 0}
    for slot in range(S):
        if slot in written:
            assert relative_error(pool[slot], reference.states[slot]) <= budget(batch["state_dtype"]), slot
        else:
            assert torch.equal(pool[slot], before[slot]), slot


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 127, 128, 129, 199, 200])
def test_a_snapshot_is_the_state_after_so_many_tokens(at: int):
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E), decay.alibi(H), tokens(200)
    reference, later = ReferencePool(pool, log_decay), pool.clone()
    lightning_attention_prefill(
        q, k, v, log_decay, pool, cu_seqlens=indices([0, 200]), slots=indices([3]),
        snapshot_at=indices([[at]]), snapshot_slots=indices([[5]]),
    )  # fmt: skip
    reference.prefill(q[:at], k[:at], v[:at], [at], [3])
    assert relative_error(pool[5], reference.states[3]) <= budget(torch.float32)
    # The cached prefix goes on from there.
    rest = [x[at:] for x in (q, k, v)]
    lightning_attention_prefill(*rest, log_decay, pool, cu_seqlens=indices([0, 200 - at]), slots=indices([5]))
    assert relative_error(pool[5], pool[3]) <= 1e-6
    # A wrong answer is noticed: a token more or less is another state.
    other = at - 1 if at else 1
    reference = ReferencePool(later, log_decay)
    reference.prefill(q[:other], k[:other], v[:other], [other], [3])
    assert relative_error(reference.states[3], ReferencePool(pool, log_decay).states[3]) > 0.1


def test_several_snapshots_unsorted_and_out_of_range():
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E), decay.alibi(H), tokens(150)
    before, reference = pool.clone(), ReferencePool(pool, log_decay)
    at, targets = [[70, 0, 100], [51, -2, 50]], [[7, 2, 6], [4, 5, 3]]
    pairs = [list(zip(*row, strict=True)) for row in zip(at, targets, strict=True)]
    reference.prefill(q, k, v, [100, 50], [0, 1], None, pairs)
    lightning_attention_prefill(
        q, k, v, log_decay, pool, cu_seqlens=indices([0, 100, 150]), slots=indices([0, 1]),
        snapshot_at=indices(at), snapshot_slots=indices(targets),
    )  # fmt: skip
    assert relative_error(pool, reference.stacked()) <= budget(torch.float32)
    assert torch.equal(pool[2], before[0])  # after no token, to the bit
    for slot in (4, 5):  # past the end, before the start
        assert torch.equal(pool[slot], before[slot])


def test_a_snapshot_of_a_fresh_sequence_does_not_see_the_old_state():
    pool, log_decay, (q, k, v) = torch.full((S, H, D, E), float("nan")), decay.alibi(H), tokens(10)
    lightning_attention_prefill(
        q, k, v, log_decay, pool, cu_seqlens=indices([0, 10]), slots=indices([0]), fresh=torch.tensor([True]),
        snapshot_at=indices([[0, 10]]), snapshot_slots=indices([[1, 2]]),
    )  # fmt: skip
    assert not pool[1].any()
    assert relative_error(pool[2], pool[0]) <= 1e-6
    assert pool[3:].isnan().all()


def test_a_bfloat16_state_is_rounded_once():
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E).bfloat16(), decay.alibi(H), tokens(300)
    exact = pool.float()
    arguments = {
        "cu_seqlens": indices([0, 299, 300]), "slots": indices([2, 0]),
        "snapshot_at": indices([[64, 256], [0, 1]]), "snapshot_slots": indices([[1, 3], [5, 6]]),
    }  # fmt: skip
    out = lightning_attention_prefill(q, k, v, log_decay, pool, **arguments)
    assert torch.equal(out, lightning_attention_prefill(q, k, v, log_decay, exact, **arguments))
    assert torch.equal(pool, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pool_that_is_rounded_between_calls_gives_no_bits_to_rely_on(dtype: torch.dtype):
    wrong = "state of a call with batch_invariant has dtype .*; it must be float32"
    with pytest.raises(TypeError, match=wrong):
        lightning_attention_prefill(
            *tokens(300), decay.alibi(H), torch.zeros(S, H, D, E, dtype=dtype), cu_seqlens=indices([0, 300]),
            slots=indices([2]), batch_invariant=True,
        )  # fmt: skip


def test_decode_rows_among_prompts_are_decode():
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E), decay.alibi(H), tokens(103)
    alone = pool.clone()
    slots = indices([5, 1, 4, 2])
    out = lightning_attention_prefill(q, k, v, log_decay, pool, cu_seqlens=indices([0, 1, 2, 102, 103]), slots=slots)
    rows = indices([0, 1, 102])
    steps = lightning_attention_decode(q[rows], k[rows], v[rows], log_decay, alone, slots=slots[indices([0, 1, 3])])
    assert relative_error(out[rows], steps) <= 1e-6
    for slot in (5, 1, 2):
        assert relative_error(pool[slot], alone[slot]) <= 1e-6


def test_without_slots_row_i_is_sequence_i():
    pool, log_decay, (q, k, v) = torch.randn(2, H, D, E), None, tokens(9)
    by_slots = pool.clone()
    cu_seqlens = indices([0, 4, 9])
    out = lightning_attention_prefill(q, k, v, log_decay, pool, cu_seqlens=cu_seqlens)
    assert torch.equal(
        out, lightning_attention_prefill(q, k, v, log_decay, by_slots, cu_seqlens=cu_seqlens, slots=indices([0, 1]))
    )
    assert torch.equal(pool, by_slots)


def test_no_tokens_at_all():
    pool, (q, k, v) = torch.randn(S, H, D, E), tokens(0)
    before = pool.clone()
    out = lightning_attention_prefill(
        q, k, v, decay.alibi(H), pool, cu_seqlens=indices([0, 0, 0]), slots=indices([1, 2]),
        fresh=torch.tensor([True, False]), snapshot_at=indices([[0], [0]]), snapshot_slots=indices([[3], [4]]),
    )  # fmt: skip
    assert out.shape == (0, H, E)
    assert not pool[1].any()
    assert not pool[3].any()
    assert torch.equal(pool[4], before[2])
    assert torch.equal(pool[[0, 2, 5, 6, 7]], before[[0, 2, 5, 6, 7]])
