"""One step of the recurrence over a pool of states: every state is read once and written once."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_attention.kernels.triton import dispatch, tiling
from lightning_attention.kernels.triton.recording import recorded
from lightning_attention.kernels.triton.recurrent import StateTile, decode_kernel


@cache
def columns(D: int, E: int, dtype: torch.dtype, states: int = 1) -> int:
    """Columns of a state that one program has, where registers hold ``states`` of them.

    Raises:
        TypeError, ValueError: the kernels do not take such a call.
    """
    refused = tiling.refusal(D, dtype)
    if refused is not None:
        raise refused
    return min(64, 64 * 128 // (states * tiling.padded(D)), tiling.padded(E))


@cache
def narrower(widest: int, N: int, H: int, state_dtype: torch.dtype) -> int:
    """Columns where N · H states may be too few for programs of ``widest`` columns.

    The kernel alone on an H200, H 64, D 128, in µs at N 1, 8, 64, 256, L2 cold. float32: 4.3, 26.0, 199, 799 with 16
    columns; 4.9, 21.1, 148, 576 with 32; 5.1, 21.5, 139, 537 with 64. bfloat16: 4.0, 15.9, 132, 602; 3.7, 13.2, 108,
    438; 4.2, 13.4, 80, 299.
    """
    if N * H >= 2048:
        return widest
    return min(widest, 16 if N * H < 256 and state_dtype == torch.float32 else 32)


def layout(state: Tensor, strides: tuple[int, ...], D: int, E: int) -> tuple[bool, bool]:
    """Whether a state is one piece of memory whose rows can be read 16 bytes at a time, or columns; which of them."""
    slot, head, row, column = strides
    columns_first = row == 1 != column
    within = (D if columns_first else E) if strides[2:] in ((E, 1), (1, D)) else 1
    is_aligned = not ((slot | head | within) * state.itemsize | state.data_ptr()) & 15
    return is_aligned, columns_first


@cache
def tile_constants(D: int, E: int, group: int, columns: int, aligned: bool, columns_first: bool) -> tuple[StateTile]:
    return (StateTile(D, E, tiling.padded(D), columns, aligned, columns_first, group),)


def over_states(
    kernel: Any, sizes: tuple[int, ...], args: tuple[Any, ...], state: Tensor, strides: tuple[int, ...], TILE: int,
    widest: int = 0, *, written: Tensor | None = None, ring: tuple[Any, ...] = (), programs: int = 0,
) -> None:  # fmt: skip
    """Launch a kernel of ``recurrent.py`` in programs of TILE columns, another time of up to ``widest``.

    With its ``ring``'s constants, of ``ring.py``; ``programs``: how many, where it is not one for each TILE columns.

    ``sizes``: sequences, H, D, E and heads of v to a head of q and k; ``strides``: the state's, which takes 0.4 µs to
    ask again; ``written``: another pool, which the kernel writes.
    """
    N, H, D, E, group = sizes
    lie = layout(state, strides, D, E)
    if written is not None and layout(written, written.stride(), D, E) != lie:
        lie = False, False
    dispatch.run(
        kernel, (programs or N * H * -(-E // TILE), 1, 1), args, tile_constants(D, E, group, TILE, *lie) + ring, 4,
        state.get_device(),
        lambda: [tile_constants(D, E, group, other, *lie) + ring for other in (16, 32, 64, 128) if other <= widest],
    )  # fmt: skip


@recorded
def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float,
    batch_invariant: bool, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    (N, H, E), (_, Hk, D) = v.shape, k.shape
    widest = columns(D, E, q.dtype)
    made = None if out is not None else torch.empty_like(v, memory_format=torch.contiguous_format)
    if N == 0:
        return made
    strides = state.stride()
    args = (
        q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], out if made is None else made, state, *strides,
        dispatch.dense(slots), dispatch.dense(log_decay), H, scale, int(made is not None),
    )  # fmt: skip
    # Columns decide in which order a program sums over D.
    TILE = widest if batch_invariant else narrower(widest, N, H, state.dtype)
    over_states(decode_kernel, (N, H, D, E, H // Hk), args, state, strides, TILE, widest)
    return made
