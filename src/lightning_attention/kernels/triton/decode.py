"""One step of the recurrence over a pool of states: every state is read once and written once."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_attention.kernels.triton import dispatch, tiling
from lightning_attention.kernels.triton.recurrent import StateTile, decode_kernel


@cache
def columns(D: int, E: int, dtype: torch.dtype, states: int = 1) -> int:
    """Columns of a state that one program has, where registers hold ``states`` of them.

    Raises:
        TypeError, ValueError: the kernels do not take such a call.
    """
    refused = tiling.refusal(D, E, dtype)
    if refused is not None:
        raise refused
    return min(64, 64 * 128 // (states * tiling.padded(D)), tiling.padded(E))


@cache
def narrower(widest: int, N: int, H: int, state_dtype: torch.dtype) -> int:
    """Columns where N · H states may be too few for programs of ``widest`` columns.

    Measured on an H200, H 64, D 128, in µs at N 1, 8, 64, 256, L2 cold. float32: 4.3, 26.0, 199, 799 with 16 columns;
    4.9, 21.1, 148, 576 with 32; 5.1, 21.5, 139, 537 with 64. bfloat16: 4.0, 15.9, 132, 602; 3.7, 13.2, 108, 438; 4.2,
    13.4, 80, 299.
    """
    if N * H >= 2048:
        return widest
    return min(widest, 16 if N * H < 256 and state_dtype == torch.float32 else 32)


def aligned(state: Tensor) -> bool:
    """Whether every row of every state can be read 16 bytes at a time."""
    slot, head, row, column = state.stride()
    return column == 1 and not ((slot | head | row) * state.itemsize | state.data_ptr()) & 15


def over_states(
    kernel: Any, N: int, vectors: tuple[Any, ...], state: Tensor, others: tuple[Any, ...], TILE: int, widest: int = 0
) -> None:
    """Launch a kernel of ``recurrent.py`` for N sequences, a program for TILE columns; another time up to ``widest``.

    ``vectors`` and ``others``: its arguments before and after those that say where states are.
    """
    _, H, D, E = state.shape
    tile = StateTile(D, E, tiling.padded(D), TILE, aligned(state))
    dispatch.run(
        kernel, (N * H * -(-E // TILE), 1, 1), (*vectors, state, *state.stride(), *others), (tile,), 4,
        state.get_device(), lambda: [(tile._replace(columns=x),) for x in (16, 32, 64) if x <= widest],
    )  # fmt: skip


def vectors(*tensors: Tensor) -> tuple[Any, ...]:
    """Tensors [T, H, *] as the kernels take them."""
    return tuple([x for t in tensors for x in (t, *t.stride()[:2])])


@dispatch.on_its_device
def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    N, H, D = q.shape
    widest = columns(D, v.shape[2], q.dtype)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if N == 0:
        return out
    others = dispatch.dense(slots), dispatch.dense(log_decay), H, scale
    TILE = narrower(widest, N, H, state.dtype)
    over_states(decode_kernel, N, (*vectors(q, k, v), out), state, others, TILE, widest)
    return out
