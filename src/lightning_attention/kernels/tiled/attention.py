"""Lightning Attention-2 (arXiv 2401.04658, Algorithms 1 and 2) in four sweeps, shared out by heads.

On a CPU a thread has a share of its own, and works on a piece of its sequences at a time, in buffers that stay in a
core's cache and are all that a call takes beside its results.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attention.kernels.tiled import threads
from lightning_attention.kernels.tiled.decays import Decay, rate_of
from lightning_attention.kernels.tiled.layout import Layout, layout_of
from lightning_attention.kernels.tiled.sweep import Drift, Run, space_for, sweep

BLOCK = 64  # C
PIECE = 4  # blocks, where there are several heads; one head takes what fits into the buffer
BUFFER = 2**16  # numbers in one of a piece's buffers
SHARED = 2**17  # numbers of v below which a call is not worth handing over to threads
LINE = 16  # numbers: 64 bytes of float32


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Share:
    """Some heads of some rows of the batch; views of them."""

    def __init__(self, run: Run, rows: slice, heads: slice, packed: bool) -> None:
        self.run, self._rows, self._heads, self._packed = run, rows, heads, packed

    def tokens(self, x: Tensor) -> Tensor:
        """[B, T, H, X] -> theirs."""
        return x[self._rows, :, self._heads]

    def states(self, x: Tensor | None) -> Tensor | None:
        """[N, H, D, E] -> theirs."""
        return None if x is None else x[slice(None) if self._packed else self._rows, self._heads]

    def heads(self, x: Tensor) -> Tensor:
        """[H] -> theirs."""
        return x[self._heads]


class _Plan:
    """How a call is cut: the sequences into pieces, and the rows and heads of the batch into shares."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        batch_invariant: bool,
    ) -> None:
        (B, _, H, D), E, self.device = k.shape, v.shape[3], k.device
        self.width, self.packed, self.dtype = max(D, E), cu_seqlens is not None, _accumulator(k.dtype)
        layout = layout_of(k, cu_seqlens, BLOCK)
        count = threads.available() if self.device.type == "cpu" else 1
        # With fewer heads than half the threads, too many would have nothing to do: then all work on each operation.
        together = count > 2 * B * H and not batch_invariant
        self.workers = 1 if together or v.numel() < SHARED else count
        numbers = BUFFER * (count if together else 1) if self.device.type == "cpu" else 64 * BUFFER
        blocks = max(1, numbers // (BLOCK * max(BLOCK, self.width)))
        # Heads before blocks: they lie side by side in memory, and the loop over blocks has fewer steps.
        self.units = max(1, min(blocks // PIECE, ceil(B * H / self.workers)))
        self.blocks = max(1, min(blocks // self.units, layout.num_blocks))
        self.units = max(1, min(blocks // self.blocks, ceil(B * H / self.workers)))
        decay = Decay(rate_of(log_decay, H, self.dtype, self.device), scale, BLOCK)
        self.shares = list(self._shares(layout, decay, B, H, batch_invariant))

    def _shares(self, layout: Layout, decay: Decay, B: int, H: int, invariant: bool) -> Iterator[_Share]:
        pieces = [
            layout.piece(start, min(start + self.blocks, layout.num_blocks))
            for start in range(0, layout.num_blocks, self.blocks)
        ]
        heads = ceil(H / ceil(H / self.units))
        rows = max(1, self.units // H)
        self.units = min(rows, B) * heads
        for h in range(0, H, heads):
            some = slice(h, h + heads)
            run = Run(layout, decay.of(some), pieces, invariant)
            for b in range(0, B, rows):
                yield _Share(run, slice(b, b + rows), some, self.packed)

    def run(self, tasks: list[Callable[[Tensor], None]], D: int, E: int, *, drift: bool = False) -> None:
        if not tasks:
            return
        size = max(space_for(self.blocks, self.units, BLOCK, Y, Z, drift=drift) for Y, Z in ((D, E), (E, D)))
        shape = (min(self.workers, len(tasks)), size)
        threads.run(tasks, torch.empty(shape, dtype=self.dtype, device=self.device).unbind())


_Padded = TypeVar("_Padded", Tensor, Tensor | None)


def _whole_lines(x: _Padded, dims: int = 1) -> _Padded:
    """Pad the last sizes, D or E or both, to whole cache lines.

    The bits of a matrix product depend on how its operands are aligned and shared among threads, and an odd D×E state
    is aligned by its place in the batch: with MKL a tenth of the odd sizes gave other bits in another batch.
    """
    if x is None:
        return x
    return F.pad(x, [n for size in x.shape[: -dims - 1 : -1] for n in (0, -size % LINE)])


def _cut(x: Tensor, *sizes: int) -> Tensor:
    """The first of the last sizes, as a tensor of its own."""
    for dim, size in enumerate(sizes, -len(sizes)):
        x = x.narrow(dim, 0, size)
    return x.clone(memory_format=torch.contiguous_format)


def _left(given: Tensor | None, like: Tensor, N: int, D: int, E: int) -> Tensor:
    """States [N, H, D, E] that a sweep is to leave, as those of empty sequences are: as they came."""
    if given is None:
        return torch.zeros(N, like.shape[2], D, E, dtype=_accumulator(like.dtype), device=like.device)
    return given.clone(memory_format=torch.contiguous_format)


def _empty(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For results; those of the tokens past the last packed sequence are zero."""
    return like.new_empty(like.shape) if cu_seqlens is None else like.new_zeros(like.shape)


def attention(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor | None]:
    """Outputs [B, T, H, E] and final states [N, H, D, E]; q None computes the states alone, with empty outputs."""
    D, E = k.shape[3], v.shape[3]
    if batch_invariant and (D % LINE or E % LINE):
        q, k, v, initial_state = _whole_lines(q), _whole_lines(k), _whole_lines(v), _whole_lines(initial_state, 2)
        out, final = attention(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, True)
        return out if q is None else _cut(out, E), None if final is None else _cut(final, D, E)
    plan = _Plan(k, v, log_decay, cu_seqlens, scale, batch_invariant)
    out = v.new_empty(0) if q is None else _empty(v, cu_seqlens)
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    final = _left(initial_state, k, N, D, E) if output_final_state else None

    def task(share: _Share) -> Callable[[Tensor], None]:
        tokens, states = share.tokens, share.states
        return lambda space: sweep(
            share.run, space, None if q is None else tokens(q), tokens(k), tokens(v),
            None if q is None else tokens(out), given=states(initial_state), leave=states(final),
        )  # fmt: skip

    plan.run([task(share) for share in plan.shares], D, E)
    return out, final


def attention_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    batch_invariant: bool,
    need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, log_decay [H] and initial_state [N, H, D, E] (None where there is none)."""
    D, E = k.shape[3], v.shape[3]
    if batch_invariant and (D % LINE or E % LINE):
        q, k, v, dout = (_whole_lines(x) for x in (q, k, v, dout))
        dfinal, initial_state = _whole_lines(dfinal, 2), _whole_lines(initial_state, 2)
        dq, dk, dv, dlog, dinitial = attention_backward(
            dout, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, True, need_dlog_decay
        )
        return _cut(dq, D), _cut(dk, D), _cut(dv, E), dlog, None if dinitial is None else _cut(dinitial, D, E)
    plan = _Plan(k, v, log_decay, cu_seqlens, scale, batch_invariant)
    dq, dk, dv = (_empty(x, cu_seqlens) for x in (q, k, v))
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    dinitial = None if initial_state is None else _left(dfinal, k, N, D, E)
    # A row a share, added up in their order.
    dlog = k.new_zeros(len(plan.shares), k.shape[2], dtype=plan.dtype) if need_dlog_decay else None

    def tasks(share: _Share, i: int) -> Iterator[Callable[[Tensor], None]]:
        run, states = share.run, share.states
        g, q_, k_, v_ = (share.tokens(x) for x in (dout, q, k, v))
        initial, dend = states(initial_state), states(dfinal)
        across = None if dend is None else dend.mT

        def dq_and_dlog(space: Tensor) -> None:
            drift = None if dlog is None else Drift(q_, across, share.heads(dlog[i]))
            given = None if initial is None else initial.mT
            sweep(run, space, g, v_, k_, share.tokens(dq), given=given, drift=drift)

        yield dq_and_dlog
        yield lambda space: sweep(run, space, v_, g, q_, share.tokens(dk), given=across, reverse=True)
        yield lambda space: sweep(
            run, space, k_, q_, g, share.tokens(dv), given=dend, leave=states(dinitial), reverse=True
        )

    plan.run([task for i, share in enumerate(plan.shares) for task in tasks(share, i)], D, E, drift=need_dlog_decay)
    return dq, dk, dv, None if dlog is None else dlog.sum(0), dinitial
