"""One step of the recurrence over a pool of states: every state is read once and written once."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lightning_attention.kernels.triton import launch
from lightning_attention.kernels.triton.step import decode_kernel


@cache
def columns(D: int, E: int, dtype: torch.dtype, states: int = 1) -> int:
    """TE, columns of a state that one program has, where registers hold ``states`` of them.

    Measured on an H200, H 64, D 128, of the copy rate at N 8, 64, 256: float32 with 64 columns 0.74, 0.92, 0.95, with
    32 0.75, 0.86, 0.88, with 128 0.71, 0.89, 0.93; bfloat16 0.60, 0.80, 0.86 with 64 and 0.61, 0.59, 0.58 with 32.
    """
    launch.tiles((0, 0), D, E, dtype, False)  # raises for what the kernels do not take
    return min(64, 64 * 128 // (states * rows(D)), max(16, triton.next_power_of_2(E)))


@cache
def rows(D: int) -> int:
    """BD, the power of two that D is padded to."""
    return max(16, triton.next_power_of_2(D))


def aligned(state: Tensor) -> bool:
    """Whether every row of every state can be read 16 bytes at a time."""
    slot, head, row, column = state.stride()
    return column == 1 and not ((slot | head | row) * state.itemsize | state.data_ptr()) & 15


def constants(D: int, E: int, TE: int, ALIGNED: bool) -> dict[str, Any]:
    return {"D": D, "E": E, "BD": rows(D), "TE": TE, "ALIGNED": ALIGNED}


@launch.on_its_device
def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    N, H, D = q.shape
    E = v.shape[2]
    TE = columns(D, E, q.dtype)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if N == 0:
        return out
    if log_decay is not None:
        log_decay = log_decay.contiguous()
    if slots is not None:
        slots = slots.contiguous()
    sizes = D, E, TE, aligned(state)
    args = (
        q, k, v, out, state, slots, log_decay, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *state.stride(), H,
        scale,
    )  # fmt: skip
    key = (
        q.get_device(), q.dtype, state.dtype, sizes, log_decay is None, None if slots is None else slots.dtype,
    )  # fmt: skip
    launch.run(decode_kernel, (N * H * -(-E // TE), 1, 1), args, key, lambda: constants(*sizes))
    return out
