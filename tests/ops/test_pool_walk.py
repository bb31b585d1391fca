"""A server's day: a hundred mixed operations on one pool, which must stay that of the float64 recurrence."""

import random

import pytest
import torch
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
STEPS = 100


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_operations(seed: int):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    log_decay = decay.alibi(H)
    pool = torch.randn(S, H, D, E)
    reference = ReferencePool(pool, log_decay)
    for step in range(STEPS):
        before = pool.clone()
        touched = _operate(rng, pool, reference, log_decay)
        # float32 errors fade with the states; without decay they would add up over the walk.
        assert relative_error(pool, reference.stacked()) <= 2e-6, step
        for slot in set(range(S)) - touched:
            assert torch.equal(pool[slot], before[slot]), (step, slot)


def _operate(rng: random.Random, pool: Tensor, reference: ReferencePool, log_decay: Tensor) -> set[int]:
    """One operation, its outputs checked; the slots that it may have changed."""
    rows = rng.sample(range(S), S)
    N = rng.randint(1, 4)
    slots = [rows[n] if rng.random() < 0.8 else -1 for n in range(N)]
    owned = {slot for slot in slots if slot >= 0}
    operation = rng.choice(["decode", "decode", "prefill", "draft"])
    lengths = [1 if operation == "decode" else rng.choice([0, 1, 2, 5, 64, 70]) for _ in range(N)]
    if operation == "draft":
        lengths = [min(length, 5) for length in lengths]
    T = sum(lengths)
    q, k, v = torch.randn(T, H, D), torch.randn(T, H, D), torch.randn(T, H, E)
    index = {"cu_seqlens": cumulative(lengths), "slots": torch.tensor(slots)}

    if operation == "decode":
        out = lightning_attention_decode(q, k, v, log_decay, pool, slots=index["slots"])
        expected = reference.decode(q, k, v, slots)
    elif operation == "prefill":
        fresh = [rng.random() < 0.3 for _ in range(N)]
        at = [rng.randint(0, length + 1) for length in lengths]
        out = lightning_attention_prefill(
            q, k, v, log_decay, pool, fresh=torch.tensor(fresh), snapshot_at=torch.tensor(at).view(N, 1),
            snapshot_slots=torch.tensor(rows[N : 2 * N]).view(N, 1), **index,
        )  # fmt: skip
        snapshots = [[(a, rows[N + n])] for n, a in enumerate(at)]
        expected = reference.prefill(q, k, v, lengths, slots, fresh, snapshots)
        owned |= {rows[N + n] for n in range(N) if slots[n] >= 0 and at[n] <= lengths[n]}
    else:
        parents = [rng.randint(-1, i - 1) for length in lengths for i in range(length)]
        out = lightning_attention_verify(q, k, v, log_decay, pool, parents=torch.tensor(parents).long(), **index)
        expected = reference.verify(q, k, v, lengths, slots, parents)
        accepted = [rng.random() < 0.5 for _ in range(T)]
        mask = torch.tensor(accepted, dtype=torch.bool)
        lightning_attention_commit(k, v, log_decay, pool, accepted=mask, **index)
        reference.commit(k, v, lengths, slots, accepted)
    assert relative_error(out, expected) <= 5e-6, operation
    return owned
