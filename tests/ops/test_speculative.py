"""Drafts, as chains and as trees, against a dictionary of float64 states."""

import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention import (
    decay,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_verify,
)
from tests.support import ReferencePool, budget, cumulative, relative_error

S, H, D, E = 6, 2, 8, 5

# Each draft's parent within its sequence. Depth 4 and two branches; three roots, one of them a chain; one draft.
TREES = {
    "branches": [-1, 0, 0, 1, 2, 3, 4, 5],
    "several roots": [-1, -1, 0, 2, -1, 1, 3],
    "a chain": [-1, 0, 1, 2, 3],
    "one draft": [-1],
}


def tokens(T: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(T, H, D), torch.randn(T, H, D), torch.randn(T, H, E)


def indices(x: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(x, dtype=dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tree", TREES)
def test_trees(tree: str, index_dtype: torch.dtype):
    parents = TREES[tree]
    T = len(parents)
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E), decay.alibi(H), tokens(3 * T)
    before, lengths, slots = pool.clone(), [T, 0, T, T], [4, 0, -1, 2]
    out = lightning_attention_verify(
        q, k, v, log_decay, pool,
        cu_seqlens=cumulative(lengths, index_dtype), slots=indices(slots, index_dtype),
        parents=indices(parents * 3, index_dtype), scale=0.5,
    )  # fmt: skip
    expected = ReferencePool(pool, log_decay, 0.5).verify(q, k, v, lengths, slots, parents * 3)
    assert torch.equal(pool, before)
    assert relative_error(out, expected) <= budget(torch.float32)
    if tree == "branches":  # the tree is looked at: as a chain the answer is another
        chain = ReferencePool(pool, log_decay, 0.5).verify(q, k, v, lengths, slots)
        assert relative_error(out, chain) > 0.1


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chains_are_decoding(state_dtype: torch.dtype):
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E).to(state_dtype), decay.alibi(H), tokens(12)
    before = pool.clone()
    cu_seqlens, slots = indices([0, 5, 12]), indices([3, 1])
    out = lightning_attention_verify(q, k, v, log_decay, pool, cu_seqlens=cu_seqlens, slots=slots)
    as_tree = lightning_attention_verify(
        q, k, v, log_decay, pool, cu_seqlens=cu_seqlens, slots=slots,
        parents=indices([*range(-1, 4), *range(-1, 6)]),
    )  # fmt: skip
    assert torch.equal(pool, before)
    assert relative_error(as_tree, out) <= 1e-6
    exact = pool.float()
    for n, slot in enumerate(slots):
        for t in range(int(cu_seqlens[n]), int(cu_seqlens[n + 1])):
            step = lightning_attention_decode(q[t, None], k[t, None], v[t, None], log_decay, exact, slots=slot[None])
            assert relative_error(out[t, None], step) <= 1e-5


def drafts_of(draw: st.DrawFn, length: int, tree: bool) -> list[int]:
    return [draw(st.integers(-1, i - 1)) if tree else i - 1 for i in range(length)]


@st.composite
def batches(draw: st.DrawFn) -> dict[str, object]:
    """Sequences of up to 70 drafts, some empty, some padding, with a tree each and one path accepted."""
    N = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.one_of(st.integers(0, 6), st.sampled_from([64, 70])), min_size=N, max_size=N))
    rows = draw(st.permutations(range(S)))
    tree = draw(st.booleans())
    parents = [drafts_of(draw, length, tree) for length in lengths]
    accepted = []
    for own in parents:
        path, at = set(), draw(st.integers(-1, len(own) - 1))
        while at >= 0:
            path.add(at)
            at = own[at]
        accepted += [i in path for i in range(len(own))]
    return {
        "lengths": lengths,
        "slots": [rows[n] if draw(st.integers(0, 4)) else -1 for n in range(N)],
        "parents": [p for own in parents for p in own] if tree else None,
        "accepted": accepted,
        "padding": draw(st.sampled_from([0, 1, 70])),
        "state_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(batches())
def test_any_batch(batch: dict):
    torch.manual_seed(batch["seed"])
    lengths, slots, parents, accepted = (batch[name] for name in ("lengths", "slots", "parents", "accepted"))
    total, padding, index_dtype = sum(lengths), batch["padding"], batch["index_dtype"]
    pool, log_decay, (q, k, v) = torch.randn(S, H, D, E), decay.alibi(H), tokens(total + padding)
    for x in (q, k, v):
        x[total:] = float("nan")
    pool = pool.to(batch["state_dtype"])
    before, reference = pool.clone(), ReferencePool(pool, log_decay)
    where = {"cu_seqlens": cumulative(lengths, index_dtype), "slots": indices(slots, index_dtype)}
    given_parents = None if parents is None else indices(parents + [10**6] * padding, index_dtype)

    out = lightning_attention_verify(q, k, v, log_decay, pool, parents=given_parents, **where)
    assert torch.equal(pool, before)
    assert relative_error(out, reference.verify(q, k, v, lengths, slots, parents)) <= 2 * budget(torch.float32)

    mask = torch.tensor([*accepted, *[True] * padding], dtype=torch.bool)
    lightning_attention_commit(k, v, log_decay, pool, accepted=mask, parents=given_parents, **where)
    reference.commit(k, v, lengths, slots, accepted)
    for slot in range(S):
        if slot in slots:
            assert relative_error(pool[slot], reference.states[slot]) <= budget(batch["state_dtype"]), slot
        else:
            assert torch.equal(pool[slot], before[slot]), slot


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accepted", ["none", "some", "all"])
def test_commit(accepted: str, state_dtype: torch.dtype):
    pool, log_decay, (_, k, v) = torch.randn(S, H, D, E).to(state_dtype), decay.alibi(H), tokens(9)
    before, exact = pool.clone(), pool.float()
    mask = {"none": [False] * 9, "some": [True, True, False, False, *[True] * 3, False, False], "all": [True] * 9}
    arguments = {
        "cu_seqlens": indices([0, 4, 4, 9]), "accepted": torch.tensor(mask[accepted]), "slots": indices([5, 0, 2])
    }  # fmt: skip
    reference = ReferencePool(pool, log_decay)
    assert lightning_attention_commit(k, v, log_decay, pool, **arguments) is None
    reference.commit(k, v, [4, 0, 5], [5, 0, 2], mask[accepted])
    assert relative_error(pool, reference.stacked()) <= budget(state_dtype)
    lightning_attention_commit(k, v, log_decay, exact, **arguments)
    assert torch.equal(pool, exact.to(state_dtype))
    for slot in (0, 1, 3, 4) if accepted != "none" else range(S):
        assert torch.equal(pool[slot], before[slot]), slot


@pytest.mark.parametrize(
    ("accepted", "parents", "message"),
    [
        ([1, 0, 1, 0, 0], None, "accepted[2] is True; draft 2 of its sequence follows draft 1, and the accepted one "),
        ([0, 1, 0, 0, 0], None, "follows draft 0, and the accepted one before it is none"),
        ([1, 1, 0, 1, 1], [-1, -1, 0, -1, 0], "accepted[1] is True; draft 1 of its sequence follows the state"),
        ([0, 0, 0, 0, 1], [-1, 0, 1, -1, 0], "accepted[4] is True; draft 1 of its sequence follows draft 0"),
    ],
)
def test_a_path_with_a_hole_is_refused(accepted: list[int], parents: list[int] | None, message: str):
    pool, (_, k, v) = torch.randn(S, H, D, E), tokens(5)
    before = pool.clone()
    options = {"accepted": torch.tensor(accepted, dtype=torch.bool), "cu_seqlens": indices([0, 3, 5])}
    if parents is not None:
        options["parents"] = indices(parents)
    with pytest.raises(ValueError, match=re.escape(message)):
        lightning_attention_commit(k, v, None, pool, slots=indices([5, 2]), **options)
    assert torch.equal(pool, before)
    # Padding may hold anything.
    lightning_attention_commit(k, v, None, pool, slots=indices([-1, -1]), **options)
    assert torch.equal(pool, before)


def test_without_slots_row_i_is_sequence_i():
    pool, (q, k, v) = torch.randn(2, H, D, E), tokens(5)
    by_slots, cu_seqlens, slots = pool.clone(), indices([0, 2, 5]), indices([0, 1])
    out = lightning_attention_verify(q, k, v, None, pool, cu_seqlens=cu_seqlens)
    assert torch.equal(out, lightning_attention_verify(q, k, v, None, by_slots, cu_seqlens=cu_seqlens, slots=slots))
    accepted = torch.ones(5, dtype=torch.bool)
    lightning_attention_commit(k, v, None, pool, cu_seqlens=cu_seqlens, accepted=accepted)
    lightning_attention_commit(k, v, None, by_slots, cu_seqlens=cu_seqlens, accepted=accepted, slots=slots)
    assert torch.equal(pool, by_slots)


@pytest.mark.parametrize("parents", [None, []])
def test_no_drafts_at_all(parents: list[int] | None):
    pool, (q, k, v) = torch.randn(S, H, D, E), tokens(0)
    before, where = pool.clone(), {"cu_seqlens": indices([0, 0, 0]), "slots": indices([3, -1])}
    out = lightning_attention_verify(
        q, k, v, decay.alibi(H), pool, parents=None if parents is None else indices(parents), **where
    )
    assert out.shape == (0, H, E)
    lightning_attention_commit(k, v, decay.alibi(H), pool, accepted=torch.ones(0, dtype=torch.bool), **where)
    assert torch.equal(pool, before)
