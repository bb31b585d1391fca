"""Packed batches over a pool of states: made, prefilled with the kernels, held to a dictionary of float64 states."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention import decay
from tests.kernels.triton.support.cutting import cutting
from tests.kernels.triton.support.serving import NAN, bits, moved
from tests.support import ReferencePool, budget, cumulative, relative_error

S = 9  # rows of a pool


@dataclass(frozen=True)
class Batch:
    """Arguments of a prefill, some of them as lists; what nobody owns, and what is fresh, is NaN in the pool."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    pool: Tensor
    lengths: list[int]
    slots: list[int]
    fresh: list[bool] | None
    snapshots: list[list[tuple[int, int]]]
    scale: float
    index_dtype: torch.dtype

    def arguments(self, state: Tensor) -> tuple[Tensor | float | None, ...]:
        """As the kernels take them."""

        def indices(x: Sequence) -> Tensor:
            return torch.tensor(x, dtype=self.index_dtype, device=self.q.device)

        at = to = None
        if self.snapshots and self.snapshots[0]:
            at, to = (indices([[pair[i] for pair in pairs] for pairs in self.snapshots]) for i in (0, 1))
        fresh = None if self.fresh is None else torch.tensor(self.fresh, device=self.q.device)
        cu_seqlens = indices(cumulative(self.lengths).tolist())
        return (
            self.q, self.k, self.v, self.log_decay, state, cu_seqlens, indices(self.slots), fresh, self.scale, at, to,
        )  # fmt: skip


def make_batch(
    lengths: Sequence[int],
    slots: Sequence[int] | None = None,
    *,
    fresh: Sequence[bool] | None = None,
    snapshots: Sequence[Sequence[tuple[int, int]]] = (),
    H: int = 2,
    Hk: int | None = None,
    D: int = 16,
    E: int = 16,
    rows: int = S,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    kind: str = "alibi",
    padding: int = 0,
    scale: float = 0.5,
    seed: int = 0,
    index_dtype: torch.dtype = torch.int32,
) -> Batch:
    """Views of one projection, ``padding`` tokens of NaN past the last sequence; sequence i in slot i or slots[i]."""
    generator = torch.Generator().manual_seed(seed)
    slots = list(range(len(lengths))) if slots is None else list(slots)
    projection = torch.randn(sum(lengths) + padding, H, 2 * D + E, generator=generator).to(dtype)
    projection[sum(lengths) :] = NAN
    pool = torch.randn(rows, H, D, E, generator=generator).to(state_dtype)
    for n, slot in enumerate(slots):
        if slot < 0:
            projection[sum(lengths[:n]) : sum(lengths[: n + 1])] = NAN
        elif fresh is not None and fresh[n]:
            pool[slot] = NAN
    pool[sorted(set(range(rows)) - set(slots))] = NAN
    log_decay = {"none": None, "alibi": decay.alibi(H), "strong": torch.full((H,), -8.0)}[kind]
    q, k, v = projection.split([D, D, E], 2)
    return Batch(
        q[:, :Hk], k[:, :Hk], v, log_decay, pool, list(lengths), slots, None if fresh is None else list(fresh),
        [list(pairs) for pairs in snapshots], scale, index_dtype,
    )  # fmt: skip


@st.composite
def batches(draw: st.DrawFn, edges: Sequence[int] = (5, 31, 32, 33, 63, 64, 65, 97), **sizes: object) -> Batch:
    """Sequences in slots of their own, some of them padding or fresh, with snapshots to the slots left over."""
    N = draw(st.integers(1, 4))
    rows = draw(st.permutations(range(S)))
    lengths = draw(st.lists(st.integers(0, 4) | st.sampled_from(edges), min_size=N, max_size=N))
    slots = [rows[n] if draw(st.integers(0, 4)) else -draw(st.integers(1, 3)) for n in range(N)]
    P = draw(st.integers(0, 2))
    left = [*rows[N:], -1, -1, -1]
    places = [[-1, 0, 1, 32, 63, 64, 65, length - 1, length, length + 1] for length in lengths]
    snapshots = [[(draw(st.sampled_from(places[n])), left.pop(0)) for _ in range(P)] for n in range(N)]
    return make_batch(
        lengths, slots, snapshots=snapshots, fresh=draw(st.none() | st.lists(st.booleans(), min_size=N, max_size=N)),
        padding=draw(st.sampled_from([0, 1, 70])), kind=draw(st.sampled_from(["none", "alibi", "strong"])),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])), seed=draw(st.integers(0, 2**16)), **sizes,
    )  # fmt: skip


def prefilled(
    batch: Batch, segments: bool = False, columns_first: bool = False, into: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs and pool.

    ``segments`` cuts sequences as ``cutting`` says; ``columns_first``: states lie as [E, D]; ``into``: ``out`` is
    given, full of NaN.
    """
    from lightning_attention.kernels.triton.prefill import prefill

    state = batch.pool.mT.contiguous().mT if columns_first else batch.pool.clone()
    out = torch.full_like(batch.v, NAN, memory_format=torch.contiguous_format) if into else None
    with cutting(segments):
        returned = prefill(*batch.arguments(state), False, out)
    assert (returned is None) == into
    return (out if returned is None else returned), state


def assert_right(batch: Batch, out: Tensor, state: Tensor, tolerance: float | None = None) -> None:
    """Outputs and states within the budget, or ``tolerance``; padding zero, and what nobody owns as it was."""
    batch, out, state = moved(batch, "cpu"), out.cpu(), state.cpu()
    reference = ReferencePool(batch.pool, batch.log_decay, batch.scale)
    expected = reference.prefill(batch.q, batch.k, batch.v, batch.lengths, batch.slots, batch.fresh, batch.snapshots)
    dtype = batch.v.dtype
    assert out.dtype == dtype
    assert relative_error(out, expected) <= (tolerance or 2 * budget(dtype))
    assert not out[sum(batch.lengths) :].any()
    written = set()
    for n, (slot, length) in enumerate(zip(batch.slots, batch.lengths, strict=True)):
        if slot < 0:
            assert not out[sum(batch.lengths[:n]) :][:length].any()
            continue
        written |= {slot} if length or (batch.fresh and batch.fresh[n]) else set()
        written |= {to for at, to in (batch.snapshots[n] if batch.snapshots else ()) if to >= 0 and 0 <= at <= length}
    for slot in range(len(state)):
        if slot in written:
            # A sum of few terms can end near zero: the error is relative to one of its terms, too.
            size = max(float(reference.states[slot].norm()), float(batch.k.shape[-1]))
            error = float((state[slot].double() - reference.states[slot]).norm()) / size
            assert error <= (tolerance or max(2 * budget(dtype), budget(state.dtype))), slot
        else:
            assert torch.equal(bits(state[slot]), bits(batch.pool[slot])), slot
