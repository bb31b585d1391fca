"""Forward and backward on a GPU: what is launched, in which order, over which buffers."""

from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lightning_attention.kernels.triton import launch, segments, sweep
from lightning_attention.kernels.triton.decay_gradient import decay_gradient_kernel


#: Rows, at most, in a segment of a packed batch, whose lengths nobody knows: with 32768, one sequence of 65536 among 64 of
#: 1024 took 1.4 times as long as a dense batch; with 4096, as long.
PACKED_SEGMENT = 8192


class Segments(NamedTuple):
    """The segments of a call. rows: in each but a sequence's last; per_sequence: of a dense batch; slots: in all."""

    rows: int
    per_sequence: int
    slots: int
    cut: bool
    table: Tensor | None
    first: Tensor | None


def _cut(k: Tensor, cu_seqlens: Tensor | None, tiles: launch.Tiles, programs: int, batch_invariant: bool) -> Segments:
    """``programs``: how many one segment makes for one head."""
    B, T, H, _ = k.shape
    rows = -(-T // tiles.C) * tiles.C
    if not batch_invariant:
        places = launch.device(k)[1] * tiles.per_multiprocessor
        rows = launch.segment_rows(programs * H * B, T, tiles.C, places)
    if cu_seqlens is None:
        count = -(-T // rows)
        return Segments(rows, count, B * count, count > 1, None, None)
    N = cu_seqlens.numel() - 1
    if not batch_invariant:
        rows = min(rows, PACKED_SEGMENT)
    slots = T // rows + N
    table = torch.empty(slots, 4, dtype=torch.int32, device=k.device)
    first = torch.empty(N + 1, dtype=torch.int32, device=k.device)
    launch.run(
        segments.plan_kernel, (1, 1, 1), (cu_seqlens, table, first, N, rows, slots), {"BLOCK": 1024},
        (k.device.index, cu_seqlens.dtype),
    )  # fmt: skip
    return Segments(rows, 0, slots, rows < T, table, first)


def _scan(
    cut: Segments,
    before: Tensor | None,
    after: Tensor | None,
    initial: Tensor | None,
    dfinal: Tensor | None,
    log_decay: Tensor | None,
    N: int,
    T: int,
) -> None:
    states = before if before is not None else after
    assert states is not None
    _, H, D, E = states.shape
    block = min(4096, triton.next_power_of_2(D * E))
    constants = {
        "PACKED": cut.table is not None, "BEFORE": before is not None, "AFTER": after is not None,
        "INITIAL": initial is not None, "DFINAL": dfinal is not None, "BLOCK": block,
    }  # fmt: skip
    args = (
        *(_pointer(x, states) for x in (before, after, initial, dfinal)), log_decay, cut.table, cut.first,
        cut.per_sequence, cut.rows, T, H, D * E,
    )  # fmt: skip
    key = (states.device.index, log_decay is None)
    launch.run(segments.scan_kernel, (N, H, -(-D * E // block)), args, constants, key)


def _clear_padding(cu_seqlens: Tensor, T: int, *outputs: Tensor) -> None:
    x, y, z = (outputs * 3)[:3]
    widths = [t.shape[2] * t.shape[3] if i < len(outputs) else 0 for i, t in enumerate((x, y, z))]
    args = (x, y, z, cu_seqlens, cu_seqlens.numel() - 1, T, *widths)
    key = (x.device.index, x.dtype, cu_seqlens.dtype)
    launch.run(segments.clear_padding_kernel, (-(-T // 64), 1, 1), args, {"ROWS": 64, "BLOCK": 1024}, key)


@cache
def _precision(dtype: torch.dtype, tf32: bool) -> str:
    return "ieee" if dtype == torch.float32 and not tf32 else "tf32"


def _float32_precision(x: Tensor) -> str:
    """What PyTorch's float32 matmul precision asks for."""
    return _precision(x.dtype, torch.get_float32_matmul_precision() != "highest" if x.dtype == torch.float32 else True)


def _pick(D: int, E: int, *tensors: Tensor) -> launch.Tiles:
    x = tensors[0]
    return launch.tiles(launch.device(x)[0], D, E, x.dtype, all(launch.copyable(t) for t in tensors))


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
    """Outputs [B, T, H, E] and final states [N, H, D, E] float32; q None is for the states alone."""
    q = k if q is None else q
    B, T, H, D = k.shape
    E = v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(N, H, D, E, dtype=torch.float32, device=v.device) if output_final_state else None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if T == 0:
        if final is not None:
            final.zero_() if initial_state is None else final.copy_(initial_state)
        return out, final
    tiles = _pick(D, E, q, k, v, out)
    e_tiles = -(-E // tiles.TE)
    cut = _cut(k, cu_seqlens, tiles, e_tiles, batch_invariant)
    before = torch.empty(cut.slots, H, D, E, dtype=torch.float32, device=v.device) if cut.cut else None

    grid = (cut.slots * H * e_tiles, 1, 1)
    sizes = (cut.table, cut.per_sequence, cut.rows, T, H, D, E, scale)
    common: dict[str, Any] = {
        "C": tiles.C,
        "BD": tiles.BD,
        "BE": tiles.TE,
        "STAGES": tiles.stages,
        "PACKED": cut.table is not None,
    }
    if tiles.hopper:
        from lightning_attention.kernels.triton import hopper

        args: tuple[Any, ...] = (
            *(launch.descriptor(x, tiles.C, width) for x, width in
              ((q, tiles.BD), (k, tiles.BD), (v, tiles.TE), (out, tiles.TE))),
            out, out.stride(0), out.stride(1), log_decay,
        )  # fmt: skip
        key = (q.device.index, q.dtype, log_decay is None, out.stride(1) % 16 == 0)
        launch_forward: Any = partial(launch.run, hopper.forward_kernel, grid, key=key)
    else:
        args = (q, k, v, out, *_strides(q, k, v), out.stride(0), log_decay)
        common |= {"EVEN_D": tiles.BD == D, "EVEN_E": E % tiles.TE == 0, "PRECISION": _float32_precision(q)}
        launch_forward = partial(_launch, sweep.forward_kernel, grid, warps=tiles.warps)

    if before is not None:
        flags = {"SEGMENTED": True, "INITIAL": False, "FINAL": True, "OUTPUT": False}
        launch_forward((*args, before, before, *sizes), common | flags)
        _scan(cut, before, None, initial_state, None, log_decay, N, T)
    start = initial_state if before is None else before
    flags = {"SEGMENTED": cut.cut, "INITIAL": start is not None, "FINAL": final is not None, "OUTPUT": True}
    launch_forward((*args, _pointer(start, out), _pointer(final, out), *sizes), common | flags)
    if cu_seqlens is not None:
        _clear_padding(cu_seqlens, T, out)
    return out, final


def _pointer(x: Tensor | None, other: Tensor) -> Tensor:
    """Where a kernel's pointer is not used it still adds to it, so it gets another."""
    return other if x is None else x


def _launch(
    kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    kernel[grid](*args, **constants, num_warps=warps, **launch.FUSION)


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in (x.stride(0), x.stride(1), x.stride(2))]


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
    B, T, H, D = k.shape
    E = v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dinitial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    if T == 0:
        if dinitial is not None:
            dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
        return dq, dk, dv, torch.zeros_like(log_decay) if log_decay is not None else None, dinitial
    if dout.stride(-1) != 1 or 0 in dout.stride():
        dout = dout.contiguous()
    tiles = _pick(D, E, q, k, v, dout, dq, dk, dv)
    d_tiles, e_tiles = -(-D // tiles.TD), -(-E // tiles.TE)
    cut = _cut(k, cu_seqlens, tiles, 2 * d_tiles + e_tiles, batch_invariant)
    before = after = None
    if cut.cut:
        before, after = torch.empty(2, cut.slots, H, D, E, dtype=torch.float32, device=v.device)

    sizes = (cut.table, cut.per_sequence, cut.rows, T, H, D, E, scale)
    common: dict[str, Any] = {"C": tiles.C, "BD": tiles.BD, "STAGES": tiles.stages, "PACKED": cut.table is not None}
    tiling = {**common, "BE": tiles.BE, "TD": tiles.TD, "TE": tiles.TE}
    rows = (dq.stride(0), dq.stride(1), dv.stride(0), dv.stride(1))
    precision = _float32_precision(q)
    if tiles.hopper:
        from lightning_attention.kernels.triton import hopper

        whole = ((q, tiles.BD), (k, tiles.BD), (v, tiles.BE), (dout, tiles.BE))
        parts = ((q, tiles.TD), (k, tiles.TD), (dout, tiles.TE), (dq, tiles.TD), (dk, tiles.TD), (dv, tiles.TE))
        descriptors = [launch.descriptor(x, tiles.C, width) for x, width in whole + parts]
        args: tuple[Any, ...] = (*descriptors, dq, dk, dv, *rows, log_decay)
        key = (q.device.index, q.dtype, log_decay is None, rows[1] % 16 == 0, rows[3] % 16 == 0)
        launch_backward: Any = partial(launch.run, hopper.backward_kernel, key=key)
    else:
        args = (q, k, v, dout, dq, dk, dv, *_strides(q, k, v, dout), rows[0], rows[2], log_decay)
        tiling |= {
            "EVEN_D": tiles.BD == D, "EVEN_E": tiles.BE == E, "EVEN_TD": D % tiles.TD == 0,
            "EVEN_TE": E % tiles.TE == 0, "PRECISION": precision,
        }  # fmt: skip
        launch_backward = partial(_launch, sweep.backward_kernel, warps=tiles.warps)

    heads = cut.slots * H
    if cut.cut:
        flags = {"SEGMENTED": True, "BEFORE": False, "AFTER": False, "AFTER_OUT": True, "OUTPUT": False}
        launch_backward(
            (heads * (d_tiles + e_tiles), 1, 1), (*args, before, after, before, after, *sizes), tiling | flags
        )
        _scan(cut, before, after, initial_state, dfinal, log_decay, N, T)
    else:
        before, after = initial_state, dfinal
    flags = {
        "SEGMENTED": cut.cut, "BEFORE": before is not None, "AFTER": after is not None,
        "AFTER_OUT": dinitial is not None, "OUTPUT": True,
    }  # fmt: skip
    states = [_pointer(x, dq) for x in (before, after, None, dinitial)]
    launch_backward((heads * (2 * d_tiles + e_tiles), 1, 1), (*args, *states, *sizes), tiling | flags)
    if cu_seqlens is not None:
        _clear_padding(cu_seqlens, T, dq, dk, dv)

    dlog_decay = None
    if need_dlog_decay:
        width = min(tiles.TE, 32)
        e_tiles = -(-E // width)
        partials = torch.empty(cut.slots, H, e_tiles, dtype=torch.float32, device=v.device)
        constants = {
            **common, "C": min(tiles.C, 32), "BE": width, "STAGES": 2, "EVEN_D": tiles.BD == D,
            "EVEN_E": E % width == 0, "SEGMENTED": cut.cut, "BEFORE": before is not None, "AFTER": after is not None,
            "PRECISION": precision,
        }  # fmt: skip
        states = [_pointer(x, dq) for x in (before, after)]
        args = (q, k, v, dout, *_strides(q, k, v, dout), log_decay, *states, partials, *sizes)
        _launch(decay_gradient_kernel, (partials.numel(), 1, 1), args, constants, tiles.warps)
        dlog_decay = partials.sum((0, 2))
    return dq, dk, dv, dlog_decay, dinitial
