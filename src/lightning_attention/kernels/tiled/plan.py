"""How the work of a call is divided, and what every call does with its arguments and results.

On a CPU a thread has a share of its own, and works on a piece of its sequences at a time, in buffers that stay in a
core's cache and are all that a call takes beside its results.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attention.kernels.decays import rate_of
from lightning_attention.kernels.pool import accumulator
from lightning_attention.kernels.tiled import threads
from lightning_attention.kernels.tiled.blocks import Blocks, blocks_of
from lightning_attention.kernels.tiled.decays import Decay
from lightning_attention.kernels.tiled.sweep import Run, space_for

BLOCK = 64  # C
PIECE = 4  # blocks, where there are several heads; one head takes what fits into the buffer
BUFFER = 2**16  # numbers in one of a piece's buffers
SHARED = 2**17  # numbers of v below which a call is not worth handing over to threads
LINE = 16  # numbers: 64 bytes of float32


class Share:
    """Some heads of some rows of the batch, as views; where a head of q and k serves several, heads of one of these."""

    def __init__(self, run: Run, rows: slice, heads: slice, group: int, packed: bool) -> None:
        self.run, self._rows, self._heads, self._group, self._packed = run, rows, heads, group, packed

    def tokens(self, x: Tensor) -> Tensor:
        """The share's part of [B, T, H, X]."""
        return x[self._rows, :, self._heads]

    def keys(self, x: Tensor) -> Tensor:
        """The share's part of q or k [B, T, Hk, X]."""
        if self._group == 1:
            return self.tokens(x)
        head = self._heads.start // self._group
        return x[self._rows, :, head : head + 1].expand(-1, -1, self._heads.stop - self._heads.start, -1)

    def states(self, x: Tensor | None) -> Tensor | None:
        """The share's part of [N, H, D, E]."""
        return None if x is None else x[slice(None) if self._packed else self._rows, self._heads]

    def heads(self, x: Tensor) -> Tensor:
        """The share's part of [H]."""
        return x[self._heads]


class Plan:
    """How a call is divided: the sequences into pieces, and the rows and heads of the batch into shares."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        batch_invariant: bool,
    ) -> None:
        (B, _, H, E), D, self.device = v.shape, k.shape[3], k.device
        group = H // k.shape[2]
        self.width, self.packed, self.dtype = max(D, E), cu_seqlens is not None, accumulator(k)
        blocks = blocks_of(k, cu_seqlens, BLOCK)
        count = threads.available() if self.device.type == "cpu" else 1
        # With fewer heads than half the threads, too many would have nothing to do: then all work on each operation.
        together = count > 2 * B * H and not batch_invariant
        self.workers = 1 if together or v.numel() < SHARED else count
        numbers = BUFFER * (count if together else 1) if self.device.type == "cpu" else 64 * BUFFER
        fit = max(1, numbers // (BLOCK * max(BLOCK, self.width)))
        # Heads before blocks: they lie side by side in memory, and the loop over blocks has fewer steps.
        self.units = max(1, min(fit // PIECE, ceil(B * H / self.workers)))
        self.blocks = max(1, min(fit // self.units, blocks.num_blocks))
        self.units = max(1, min(fit // self.blocks, ceil(B * H / self.workers)))
        decay = Decay(rate_of(log_decay, H, self.dtype, self.device), scale, BLOCK)
        self.shares = list(self._shares(blocks, decay, B, H, group, batch_invariant))

    def _shares(self, blocks: Blocks, decay: Decay, B: int, H: int, group: int, invariant: bool) -> Iterator[Share]:
        pieces = [
            blocks.piece(start, min(start + self.blocks, blocks.num_blocks))
            for start in range(0, blocks.num_blocks, self.blocks)
        ]
        heads = ceil(H / ceil(H / self.units))
        if group > 1:
            heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= heads)
        rows = max(1, self.units // heads)
        self.units = min(rows, B) * heads
        for h in range(0, H, heads):
            some = slice(h, h + heads)
            run = Run(blocks, decay.of(some), pieces, invariant)
            for b in range(0, B, rows):
                yield Share(run, slice(b, b + rows), some, group, self.packed)

    def run(self, tasks: list[Callable[[Tensor], None]], D: int, E: int, *, drift: bool = False) -> None:
        if not tasks:
            return
        size = max(space_for(self.blocks, self.units, BLOCK, Y, Z, drift=drift) for Y, Z in ((D, E), (E, D)))
        shape = (min(self.workers, len(tasks)), size)
        threads.run(tasks, torch.empty(shape, dtype=self.dtype, device=self.device).unbind())


_Padded = TypeVar("_Padded", Tensor, Tensor | None)


def whole_lines(x: _Padded, dims: int = 1) -> _Padded:
    """Pad the last sizes, D or E or both, to whole cache lines.

    The bits of a matrix product depend on how its operands are aligned and shared among threads, and an odd D×E state
    is aligned by its place in the batch: with MKL a tenth of the odd sizes gave other bits in another batch.
    """
    if x is None:
        return x
    return F.pad(x, [n for size in x.shape[: -dims - 1 : -1] for n in (0, -size % LINE)])


def narrowed(x: Tensor, *sizes: int) -> Tensor:
    """The first of the last sizes, as a tensor of its own."""
    for dim, size in enumerate(sizes, -len(sizes)):
        x = x.narrow(dim, 0, size)
    return x.clone(memory_format=torch.contiguous_format)


def left(given: Tensor | None, like: Tensor, cu_seqlens: Tensor | None, D: int, E: int) -> Tensor:
    """States [N, H, D, E] for a sweep to leave; empty sequences keep those that were given, or zero."""
    if given is None:
        N = like.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        return torch.zeros(N, like.shape[2], D, E, dtype=accumulator(like), device=like.device)
    return given.clone(memory_format=torch.contiguous_format)


def empty(v: Tensor, cu_seqlens: Tensor | None, width: int) -> Tensor:
    """Room for a result [B, T, H, width] for v [B, T, H, E]; zero for the tokens past the last packed sequence."""
    shape = *v.shape[:3], width
    return v.new_empty(shape) if cu_seqlens is None else v.new_zeros(shape)
