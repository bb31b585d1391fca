"""Random operations on a pool with rings of recent tokens, held to a dictionary of float64 states at every step."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from lightning_attention import (
    QuantizedStates,
    RecentTokens,
    decay,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_fold,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from lightning_attention.ops import backends
from tests.support.numerics import relative_error
from tests.support.pool import ReferencePool
from tests.support.problem import cumulative

OPERATIONS = ("decode", "decode", "decode", "prefill", "verify", "commit", "fold")


@contextmanager
def by_backend(name: str | None) -> Iterator[None]:
    """Public functions by this backend, whatever the device; None: by the device's own."""
    if name is None:
        yield
        return
    with patch.object(backends, "choose", lambda *_: name):
        yield


Pool = Tensor | QuantizedStates


@dataclass(frozen=True)
class Walk:
    """Sizes and types of a pool, and what is done to it; ``state_dtype`` int8: QuantizedStates."""

    S: int = 5
    H: int = 4
    Hk: int = 2
    D: int = 8
    E: int = 5
    R: int = 5
    dtype: torch.dtype = torch.float32
    ring_dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    rate: str = "alibi"
    operations: Sequence[str] = OPERATIONS
    lengths: Sequence[int] = (0, 1, 2, 4, 11)

    def log_decay(self) -> Tensor | None:
        none, slow = torch.full((self.H,), -torch.inf), torch.full((self.H,), -1e-6)
        return {"none": None, "alibi": decay.alibi(self.H), "no memory": none, "slow": slow}[self.rate]

    def pool(self, states: Tensor, device: str = "cpu") -> Pool:
        if self.state_dtype != torch.int8:
            return states.to(device, self.state_dtype, copy=True)
        pool = QuantizedStates.empty(*states.shape, device=device)
        pool.quantize(states.to(device))
        return pool

    def rings(self, device: str = "cpu") -> RecentTokens:
        """Empty, and NaN all over."""
        recent = RecentTokens.empty(self.S, self.H, self.D, self.E, self.R, self.ring_dtype, device)
        recent.k.fill_(torch.nan)
        recent.v.fill_(torch.nan)
        return recent


def copied(recent: RecentTokens) -> RecentTokens:
    return RecentTokens(recent.k.clone(), recent.v.clone(), recent.count.clone())


def tensors(pool: Pool) -> list[Tensor]:
    """What a pool consists of."""
    return [pool] if isinstance(pool, Tensor) else [pool.high, pool.low, pool.scale]


def whole(pool: Pool, recent: RecentTokens, log_decay: Tensor | None) -> Tensor:
    """The states that a pool and its rings mean, which stay as they are."""
    pool = pool.clone() if isinstance(pool, Tensor) else QuantizedStates(*(x.clone() for x in tensors(pool)))
    lightning_attention_fold(pool, copied(recent), log_decay)
    return pool if isinstance(pool, Tensor) else pool.dequantize()


def walk(
    of: Walk, steps: int, backend: str | None = None, device: str = "cpu", tolerance: float = 5e-6,
    look_every: int = 1, state_tolerance: float | None = None,
) -> None:  # fmt: skip
    """So many operations; every ``look_every`` the states that they leave are looked at.

    ``tolerance`` is that of outputs and, where there is no ``state_tolerance``, of states.
    """
    with by_backend(backend):
        _walk(of, steps, device, tolerance, look_every, state_tolerance or tolerance)


def _walk(of: Walk, steps: int, device: str, tolerance: float, look_every: int, state_tolerance: float) -> None:
    torch.manual_seed(0)
    rng, log_decay = random.Random(0), of.log_decay()
    states = torch.randn(of.S, of.H, of.D, of.E)
    pool, recent = of.pool(states, device), of.rings(device)
    reference = ReferencePool(pool.to("cpu", copy=True) if isinstance(pool, Tensor) else states, log_decay, 0.5)
    log_decay = None if log_decay is None else log_decay.to(device)
    all_tensors = [*tensors(pool), recent.k, recent.v, recent.count]
    for step in range(steps):
        operation = rng.choice(of.operations)
        before = [x.clone() for x in all_tensors]
        touched = _operate(of, operation, rng, pool, recent, log_decay, reference, tolerance)
        assert int(recent.count.min()) >= 0
        assert int(recent.count.max()) < 2 * of.R
        for slot in set(range(of.S)) - touched:
            for x, old in zip(all_tensors, before, strict=True):
                torch.testing.assert_close(x[slot], old[slot], rtol=0, atol=0, equal_nan=True)
        if operation == "verify":
            for x, old in zip([*tensors(pool), recent.count], [*before[:-3], before[-1]], strict=True):
                assert torch.equal(x, old)
        if step % look_every == look_every - 1:
            error = relative_error(whole(pool, recent, log_decay).cpu(), reference.stacked())
            assert error <= state_tolerance, (step, operation, error)


def _operate(
    of: Walk, operation: str, rng: random.Random, pool: Pool, recent: RecentTokens, log_decay: Tensor | None,
    reference: ReferencePool, tolerance: float,
) -> set[int]:  # fmt: skip
    """One operation, its outputs checked; the slots that it may have changed."""
    device, rows = recent.k.device, rng.sample(range(of.S), of.S)
    N = rng.randint(1, min(3, of.S - 1))
    slots = [row if rng.random() < 0.8 else -1 for row in rows[:N]]
    owned = {slot for slot in slots if slot >= 0}
    lengths = [1] * N if operation == "decode" else [rng.choice(of.lengths) for _ in range(N)]
    q, k, v = (torch.randn(sum(lengths), heads, n).to(of.dtype) for heads, n in
               ((of.Hk, of.D), (of.Hk, of.D), (of.H, of.E)))  # fmt: skip
    for n, slot in enumerate(slots):
        if slot < 0:
            for x in (q, k, v):
                x[sum(lengths[:n]) : sum(lengths[: n + 1])] = torch.nan
    there = [x.to(device) for x in (q, k, v)]
    where = {"slots": torch.tensor(slots, device=device), "recent": recent}
    packed = {"cu_seqlens": cumulative(lengths).to(device), **where}

    if operation == "fold":
        lightning_attention_fold(pool, recent, log_decay, slots=where["slots"])
        assert not recent.count[sorted(owned)].any()
        return owned
    if operation == "decode":
        out = lightning_attention_decode(
            *there, log_decay, pool, scale=0.5, batch_invariant=rng.random() < 0.5, **where
        )
        expected = reference.decode(q, k, v, slots)
    elif operation == "prefill":
        fresh = [rng.random() < 0.3 for _ in range(N)]
        options: dict[str, Tensor] = {}
        snapshots: list[list[tuple[int, int]]] = []
        if rng.random() < 0.5:
            at, to = [rng.randint(0, length + 1) for length in lengths], [rows[N]] + [-1] * (N - 1)
            options = {
                "snapshot_at": torch.tensor(at, device=device).view(N, 1),
                "snapshot_slots": torch.tensor(to, device=device).view(N, 1),
            }
            snapshots = [[pair] for pair in zip(at, to, strict=True)]
        out = lightning_attention_prefill(
            *there, log_decay, pool, scale=0.5, fresh=torch.tensor(fresh, device=device), **options, **packed
        )
        expected = reference.prefill(q, k, v, lengths, slots, fresh, snapshots)
        owned.add(rows[N])
    elif operation == "verify":
        parents = None
        if rng.random() < 0.5:
            parents = [rng.randint(-1, i - 1) for length in lengths for i in range(length)]
        given = None if parents is None else torch.tensor(parents, device=device).long()
        out = lightning_attention_verify(*there, log_decay, pool, scale=0.5, parents=given, **packed)
        expected = reference.verify(q, k, v, lengths, slots, parents)
        owned = set()
    else:
        accepted = [taken for length in lengths for most in [rng.randint(0, length)]
                    for taken in [True] * most + [False] * (length - most)]  # fmt: skip
        mask = torch.tensor(accepted, dtype=torch.bool, device=device)
        lightning_attention_commit(*there[1:], log_decay, pool, accepted=mask, **packed)
        reference.commit(k, v, lengths, slots, accepted)
        return owned
    assert relative_error(out.cpu(), expected) <= tolerance, operation
    return owned
