"""One step of the recurrence over a pool of states: every state is read once and written once."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lightning_attention.kernels.triton import launch, launcher
from lightning_attention.kernels.triton.step import decode_kernel


@cache
def columns(D: int, E: int, dtype: torch.dtype, states: int = 1) -> int:
    """TE, columns of a state that one program has, where registers hold ``states`` of them."""
    launch.tiles((0, 0), D, E, dtype, False)  # raises for what the kernels do not take
    return min(64, 64 * 128 // (states * rows(D)), max(16, triton.next_power_of_2(E)))


@cache
def narrower(widest: int, N: int, H: int, state_dtype: torch.dtype) -> int:
    """TE where N · H states may be too few for programs of ``widest`` columns.

    Measured on an H200, H 64, D 128, in µs at N 1, 8, 64, 256, L2 cold. float32: 4.3, 26.0, 199, 799 with 16 columns;
    4.9, 21.1, 148, 576 with 32; 5.1, 21.5, 139, 537 with 64. bfloat16: 4.0, 15.9, 132, 602; 3.7, 13.2, 108, 438; 4.2,
    13.4, 80, 299.
    """
    if N * H >= 2048:
        return widest
    return min(widest, 16 if N * H < 256 and state_dtype == torch.float32 else 32)


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


def over_states(
    kernel: Any, N: int, args: tuple[Any, ...], state: Tensor, TE: int, others: tuple[Tensor | None, ...]
) -> None:
    """Launch a kernel of ``step.py`` for N sequences; ``others``: of the other tensors those whose types may vary."""
    _, H, D, E = state.shape
    sizes = D, E, TE, aligned(state)
    key = (state.get_device(), *launcher.dtypes(state, *others), *sizes)
    launcher.run(kernel, (N * H * -(-E // TE), 1, 1), args, key, lambda: constants(*sizes))


@launcher.on_its_device
def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    N, H, D = q.shape
    E = v.shape[2]
    widest = columns(D, E, q.dtype)
    TE = narrower(widest, N, H, state.dtype)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if N == 0:
        return out
    log_decay, slots = launcher.dense(log_decay), launcher.dense(slots)
    is_aligned = aligned(state)
    args = (
        q, k, v, out, state, slots, log_decay, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *state.stride(), H,
        scale,
    )  # fmt: skip
    key = (q.get_device(), *launcher.dtypes(q, state, log_decay, slots), D, E, is_aligned)
    launcher.run(
        decode_kernel, (N * H * -(-E // TE), 1, 1), args, (*key, TE), lambda: constants(D, E, TE, is_aligned),
        lambda: {(*key, other): constants(D, E, other, is_aligned) for other in (16, 32, 64) if other <= widest},
    )  # fmt: skip
    return out
