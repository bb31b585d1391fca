"""Clearing the outputs of rows that belong to no sequence."""

import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch


def clear_padding(cu_seqlens: Tensor, T: int, *outputs: Tensor, slots: Tensor | None = None) -> None:
    """Zero the rows, of up to three contiguous outputs of T rows, that belong to no sequence or to one without slot."""
    x, y, z = (outputs * 3)[:3]
    widths = [t.shape[-2] * t.shape[-1] if i < len(outputs) else 0 for i, t in enumerate((x, y, z))]
    N = cu_seqlens.shape[0] - 1
    sequences = 0 if slots is None else N
    args = (x, y, z, cu_seqlens, slots, N, sequences, T, *widths)
    grid = (sequences + -(-T // 64), 1, 1)
    dispatch.run(clear_padding_kernel, grid, args, (64, 1024), 4, x.get_device())


@triton.jit
def clear_rows(x, start, stop, width, BLOCK: tl.constexpr):
    for row in range(start, stop):
        for column in range(0, width, BLOCK):
            col = column + tl.arange(0, BLOCK)
            tl.store(x + row * width + col, 0.0, mask=col < width)


@dispatch.unspecialized(triton.jit)
def clear_padding_kernel(x, y, z, cu_seqlens, slots, N, sequences, T, x_width, y_width, z_width, ROWS: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """Zero rows of up to three contiguous [T, width]; most programs have none to do.

    Those of the first ``sequences`` sequences that have no slot, and those past the last sequence.
    """
    pid = tl.program_id(0)
    first = tl.load(cu_seqlens + N).to(tl.int64)
    start = (pid - sequences).to(tl.int64) * ROWS
    stop = tl.minimum(start + ROWS, T)
    start = tl.maximum(start, first)
    if slots is not None:
        if pid < sequences:
            start = tl.load(cu_seqlens + pid).to(tl.int64)
            stop = start
            if tl.load(slots + pid) < 0:
                stop = tl.load(cu_seqlens + pid + 1).to(tl.int64)
    if start >= stop:
        return
    clear_rows(x, start, stop, x_width, BLOCK)
    clear_rows(y, start, stop, y_width, BLOCK)
    clear_rows(z, start, stop, z_width, BLOCK)
