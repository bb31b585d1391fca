"""Packed sequences that start from, and leave, their states in a pool.

Long ones are swept as in training: cut into segments where few would leave the chip idle. Of a single token nearly all
is the way of its state through memory: those get what decoding does.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_attention.kernels.triton import launch, launcher, segments, sweep
from lightning_attention.kernels.triton.attention import Forward, float32_precision, hopper
from lightning_attention.kernels.triton.decode import columns, over_states
from lightning_attention.kernels.triton.step import short_kernel

#: Rows, at most, of a sequence that is read row by row.
SHORT = 1

#: Segments of a head swept at once. How many there are nobody knows: for each that may be, N + T / rows, one program
#: would be started, and 200 tokens beside two chunks cost 26,000 of them 0.1 ms, H 64, for finding nothing to do.
PLACES = 32


@launcher.on_its_device
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    fresh: Tensor | None,
    scale: float,
    snapshot_at: Tensor | None,
    snapshot_slots: Tensor | None,
) -> Tensor:
    T, H, D = k.shape
    E, N = v.shape[2], cu_seqlens.shape[0] - 1
    if state.stride()[2:] != (E, 1):
        raise ValueError(
            f"state has strides {list(state.stride())}; backend 'triton' wants each [D, E] contiguous, the last two "
            f"[{E}, 1], to prefill"
        )
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    batch = q[None], k[None], v[None], out[None]
    cu_seqlens = cu_seqlens.contiguous()
    log_decay, slots = launcher.dense(log_decay), launcher.dense(slots)
    fresh = None if fresh is None else fresh.contiguous().view(torch.uint8)
    tiling = launch.tiling(*batch[:3])
    tiles, places, *_ = tiling
    programs = H * -(-E // tiles.TE)
    cut = segments.packed(cu_seqlens, max(T, 1), tiles.C, max(D, E), programs, places, False, slots, SHORT)
    cut = cut._replace(cut=True)  # or not, the same kernels: none is compiled when the first long prompt comes
    own, (between,) = cut.room(batch[1], E)
    if T > 0:
        forward = Forward(*batch, log_decay, scale, tiling, PLACES)
        forward.own(cut, own[0])
        segments.scan(cut, own, (between,), state, None, log_decay, cu_seqlens, N, T, slots, fresh)
    # Before the pool is written to, for they may start from what is in it.
    if snapshot_at is not None and snapshot_slots is not None:
        _, keys, values, _ = batch
        _snapshots(
            keys, values, log_decay, state, cu_seqlens, slots, fresh, cut, between, tiling, snapshot_at, snapshot_slots
        )
    if T > 0:
        forward.output(cut, state, state, between, slots, fresh)
    _short(q, k, v, out, log_decay, state, cu_seqlens, slots, fresh, scale)
    segments.clear_padding(cu_seqlens, T, out, slots=slots)
    return out


def _short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    fresh: Tensor | None,
    scale: float,
) -> None:
    _, H, D = q.shape
    args = (
        q, k, v, out, state, cu_seqlens, slots, fresh, log_decay, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *state.stride(), H, SHORT, scale,
    )  # fmt: skip
    N, TE = cu_seqlens.shape[0] - 1, columns(D, v.shape[2], q.dtype)
    over_states(short_kernel, N, args, state, TE, (q, cu_seqlens, log_decay, slots, fresh))


def _snapshots(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    fresh: Tensor | None,
    cut: segments.Segments,
    between: Tensor,
    tiling: launch.Tiling,
    at: Tensor,
    to: Tensor,
) -> None:
    _, _, H, D = k.shape
    E, (N, P) = v.shape[3], at.shape
    tiles, _, (_, of_k, of_v), _ = tiling
    at, to = at.contiguous(), to.contiguous()
    grid = (N * P * H * -(-E // tiles.TE), 1, 1)
    if grid[0] == 0:
        return
    states = (
        log_decay, state, *state.stride()[:2], slots, fresh, between, cu_seqlens, cut.first,
        at, to, P, cut.rows, H, D, E,
    )  # fmt: skip
    constants: dict[str, Any] = {"C": tiles.C, "BD": tiles.BD, "BE": tiles.TE, "STAGES": launch.stages(tiles, False)}
    if tiles.hopper:
        args = (
            launcher.Descriptor(k, of_k, tiles.C, tiles.BD),
            launcher.Descriptor(v, of_v, tiles.C, tiles.TE),
            *states,
        )
        key = (k.device.index, tiles, *launcher.dtypes(k, log_decay, state, slots, fresh, cu_seqlens, at, to))
        launcher.run(hopper().snapshot_kernel, grid, args, key, lambda: constants)
        return
    constants |= {"EVEN_D": tiles.BD == D, "EVEN_E": E % tiles.TE == 0}
    constants |= {"PRECISION": float32_precision(k), "LAZY": False}
    strides = (*k.stride()[1:3], *v.stride()[1:3])
    launcher.portable(sweep.snapshot_kernel, grid, (k, v, *strides, *states), constants, tiles)
