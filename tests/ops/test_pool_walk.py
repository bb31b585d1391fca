"""A server's day: 500 mixed operations, each pool of states held to a dictionary of float64 ones."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention import (
    decay,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from tests.support import ReferencePool, cumulative, relative_error

S, H, D, E = 9, 2, 8, 5
LENGTHS = {"decode": [1], "prefill": [0, 1, 2, 5, 64, 70], "draft": [0, 1, 2, 5]}
# What to do, and the seed of all that it is done with.
WALKS = st.lists(
    st.tuples(st.sampled_from(["decode", "decode", "prefill", "draft"]), st.integers(0, 2**16)),
    min_size=100,
    max_size=100,
)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
            ],
        ),
    ],
)
@settings(max_examples=5)
@given(walk=WALKS)
def test_a_hundred_operations(device: str, walk: list[tuple[str, int]]):
    torch.manual_seed(len(walk))
    log_decay = decay.alibi(H)
    pool = torch.randn(S, H, D, E)
    reference, pool = ReferencePool(pool, log_decay), pool.to(device)
    for step, (operation, seed) in enumerate(walk):
        torch.manual_seed(seed)
        before = pool.clone()
        touched = _operate(operation, random.Random(seed), pool, reference, log_decay.to(device))
        # float32 errors fade with the states; without decay they would add up over the walk.
        assert relative_error(pool.cpu(), reference.stacked()) <= 2e-6, step
        for slot in set(range(S)) - touched:
            assert torch.equal(pool[slot], before[slot]), (step, slot)


def _split(values: list[int], lengths: list[int]) -> list[list[int]]:
    rest = iter(values)
    return [[next(rest) for _ in range(length)] for length in lengths]


def _path(parents: list[int], rng: random.Random) -> list[bool]:
    """The drafts of a tree from its state to some draft, or none."""
    path, at = set(), rng.randint(-1, len(parents) - 1)
    while at >= 0:
        path.add(at)
        at = parents[at]
    return [i in path for i in range(len(parents))]


def _operate(operation: str, rng: random.Random, pool: Tensor, reference: ReferencePool, log_decay: Tensor) -> set[int]:
    """One operation, its outputs checked; the slots that it may have changed."""
    device = pool.device
    rows = rng.sample(range(S), S)
    N = rng.randint(1, 4)
    slots = [rows[n] if rng.random() < 0.8 else -1 for n in range(N)]
    owned = {slot for slot in slots if slot >= 0}
    lengths = [rng.choice(LENGTHS[operation]) for _ in range(N)]
    T = sum(lengths)
    q, k, v = torch.randn(T, H, D), torch.randn(T, H, D), torch.randn(T, H, E)
    there = [x.to(device) for x in (q, k, v)]
    index = {"cu_seqlens": cumulative(lengths).to(device), "slots": torch.tensor(slots, device=device)}

    if operation == "decode":
        out = lightning_attention_decode(*there, log_decay, pool, slots=index["slots"])
        expected = reference.decode(q, k, v, slots)
    elif operation == "prefill":
        fresh = [rng.random() < 0.3 for _ in range(N)]
        at = [rng.randint(0, length + 1) for length in lengths]
        out = lightning_attention_prefill(
            *there, log_decay, pool, fresh=torch.tensor(fresh, device=device),
            snapshot_at=torch.tensor(at, device=device).view(N, 1),
            snapshot_slots=torch.tensor(rows[N : 2 * N], device=device).view(N, 1), **index,
        )  # fmt: skip
        snapshots = [[(a, rows[N + n])] for n, a in enumerate(at)]
        expected = reference.prefill(q, k, v, lengths, slots, fresh, snapshots)
        owned |= {rows[N + n] for n in range(N) if slots[n] >= 0 and at[n] <= lengths[n]}
    else:
        parents = [rng.randint(-1, i - 1) for length in lengths for i in range(length)]
        index["parents"] = torch.tensor(parents, device=device).long()
        out = lightning_attention_verify(*there, log_decay, pool, **index)
        expected = reference.verify(q, k, v, lengths, slots, parents)
        accepted = [taken for own in _split(parents, lengths) for taken in _path(own, rng)]
        mask = torch.tensor(accepted, dtype=torch.bool, device=device)
        lightning_attention_commit(*there[1:], log_decay, pool, accepted=mask, **index)
        reference.commit(k, v, lengths, slots, accepted)
    assert relative_error(out.cpu(), expected) <= 5e-6, operation
    return owned
