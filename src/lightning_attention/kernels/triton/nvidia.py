"""Launches of the kernels over states that are written in Gluon, for NVIDIA chips; and which calls they take."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from lightning_attention.kernels.triton import dispatch, tiling
from lightning_attention.kernels.triton.decode import layout, tile_constants
from lightning_attention.kernels.triton.recurrent import StateTile
from lightning_attention.kernels.triton.ring import RingTile
from lightning_attention.kernels.triton.ring_commit import commit_ring_kernel
from lightning_attention.kernels.triton.ring_decode import COLUMNS, PLACES
from lightning_attention.kernels.triton.ring_verify import verify_ring_kernel
from lightning_attention.kernels.triton.state_commit import WARPS, commit_state_kernel, rows_of

#: What a thread may have. Next to nothing is spilled, and 16 programs of decode (12 of float32 over 8 bits), 13 of
#: verify and 5 of commit, which have four warps, run on a multiprocessor at once. Without a ring the compiler takes
#: more for verify than it needs, and loads later: 79 µs for 81, N 64.
REGISTERS = {
    "decode": 128, "decode of 64 columns": 152, "decode in 8 bits": 136, "decode of float32 in 8 bits": 168,
    "verify": 152, "verify of 64 columns": 168, "verify without a ring": 96, "commit": 96,
}  # fmt: skip


def aligned(x: Tensor) -> bool:
    """Whether every row of x [..., width], whose rows are contiguous, can be read 16 bytes at a time."""
    strides = x.stride()
    together = strides[0] | strides[1] | strides[-2]
    return not (together * x.itemsize | x.data_ptr()) & 15


def takes(
    N: int, q: Tensor, k: Tensor, v: Tensor, state: Tensor, low: Tensor | None, scale: Tensor | None,
    ring: RingTile | None,
) -> bool:  # fmt: skip
    """Whether the kernels take such a call: on an NVIDIA chip, whole rows, sizes that their lanes share out."""
    D, E = k.shape[-1], v.shape[-1]
    return (
        tiling.device(state)[0] >= (8, 0)
        and N < 1 << 16  # programs in the second direction of a grid
        and D in (64, 128)
        and E % COLUMNS.value == 0
        and (ring is None or (ring.places <= PLACES.value and ring.aligned_k and ring.aligned_v))
        and all(x is None or layout(x, x.stride(), D, E) == (True, False) for x in (state, low))
        and all(x is None or aligned(x) for x in (q, k, v, scale))
    )


def width(E: int, N: int, H: int, state: Tensor, batch_invariant: bool) -> int:
    """Columns of a program that is one warp: twice as many where numbers are small and there are states enough.

    They are then whole lines of memory, and what a program does once it does less often. For bfloat16 states with
    rings, H 64, N 64 and 256, twice as many take 62 and 178 µs instead of 67 and 203. Four times as many in 8 bits took
    174 for 166.
    """
    is_wide = batch_invariant or N * H >= 4096
    return max(_widths(E, state)) if is_wide else COLUMNS.value


def _widths(E: int, state: Tensor) -> tuple[int, ...]:
    """All that :func:`width` may be for other N."""
    columns = COLUMNS.value
    return (columns, 2 * columns) if E % (2 * columns) == 0 and state.itemsize < 4 else (columns,)


def registers_of_decode(columns: int, has_planes: bool, is_short: bool) -> int:
    """``is_short``: q, k, v and the ring have 16 bits."""
    if has_planes:
        return REGISTERS["decode in 8 bits" if is_short else "decode of float32 in 8 bits"]
    return REGISTERS["decode" if columns == COLUMNS.value else "decode of 64 columns"]


def registers_of_verify(columns: int, has_ring: bool) -> int:
    if not has_ring:
        return REGISTERS["verify without a ring"]
    return REGISTERS["verify" if columns == COLUMNS.value else "verify of 64 columns"]


def run(
    kernel: Any, sizes: tuple[int, ...], columns: int, args: tuple[Any, ...], ring: tuple[RingTile | None],
    state: Tensor, registers: Callable[[int], int],
) -> None:  # fmt: skip
    """Launch a program for each so many columns of a state; ``registers``: of a thread, by the columns.

    ``sizes``: sequences, H, D, E and heads of v to a head of q and k.
    """
    N, H, D, E, group = sizes

    def constants(columns: int) -> tuple[Any, ...]:
        return tile_constants(D, E, group, columns, True, False) + ring

    dispatch.run(
        kernel, (H * (E // columns), N, 1), args, constants(columns), 1, state.get_device(),
        lambda: [constants(other) for other in _widths(E, state)], lambda tile: registers(tile[0].columns),
    )  # fmt: skip


def takes_drafts(
    N: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, parents: Tensor | None, state: Tensor,
    low: Tensor | None, scale: Tensor | None, ring: RingTile | None,
) -> bool:  # fmt: skip
    """Whether :func:`verify` takes such a call: chains, in 16 bits."""
    is_short = q.itemsize == 2 and (out is None or aligned(out))
    return parents is None and is_short and takes(N, q, k, v, state, low, scale, ring)


def verify(sizes: tuple[int, ...], args: tuple[Any, ...], ring: tuple[RingTile | None], state: Tensor) -> None:
    """Launch ``verify_ring_kernel``."""
    N, H, _, E, _ = sizes
    registers = partial(registers_of_verify, has_ring=ring[0] is not None)
    run(verify_ring_kernel, sizes, width(E, N, H, state, False), args, ring, state, registers)


def takes_accepted(N: int, k: Tensor, v: Tensor, state: Tensor, low: Tensor | None, ring: RingTile | None) -> bool:
    """Whether :func:`commit` takes such a call: over floats, and without a ring in 16 bits.

    Float32 keys and values take 174 µs without a ring, N 64, and 154 by ``commit_kernel``, with twice the registers for
    what is loaded ahead.
    """
    is_plain = low is None and v.shape[-1] in (32, 64, 128, 256) and (ring is not None or k.itemsize == 2)
    return is_plain and takes(N, k, k, v, state, low, None, ring)


def commit(sizes: tuple[int, ...], args: tuple[Any, ...], ring: tuple[RingTile | None], state: Tensor) -> None:
    """Launch ``commit_ring_kernel`` or ``commit_state_kernel``."""
    N, H, D, E, group = sizes
    if ring[0] is not None:
        tile = tile_constants(D, E, group, COLUMNS.value, True, False) + ring
        dispatch.run(
            commit_ring_kernel, (H, N, 1), args, tile, E // COLUMNS.value, state.get_device(),
            registers=lambda _: REGISTERS["commit"],
        )  # fmt: skip
        return
    rows = rows_of(D, E, 16 // state.itemsize)
    part = (StateTile(D, E, rows, E, True, False, group),)
    dispatch.run(commit_state_kernel, (H * (D // rows), N, 1), args, part, WARPS.value, state.get_device())
