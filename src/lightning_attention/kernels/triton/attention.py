"""Forward and backward on a GPU: what is launched, in which order, over which buffers."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lightning_attention.kernels.triton import launch, segments, sweep
from lightning_attention.kernels.triton.decay_gradient import decay_gradient_kernel

FUSION = {"enable_fp_fusion": True}  # said outright: Triton 3.9 warns where it is left to its default


@dataclass(frozen=True)
class Segments:
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
    slots = T // rows + N
    table = torch.empty(slots, 4, dtype=torch.int32, device=k.device)
    first = torch.empty(N + 1, dtype=torch.int32, device=k.device)
    segments.plan_kernel[(1,)](cu_seqlens, table, first, N, rows, slots, BLOCK=1024, **FUSION)
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
    size, block = D * E, min(4096, triton.next_power_of_2(D * E))
    segments.scan_kernel[(N, H, -(-size // block))](
        before, after, initial, dfinal, log_decay, cut.table, cut.first, cut.per_sequence, cut.rows, T, H, size,
        PACKED=cut.table is not None, BEFORE=before is not None, AFTER=after is not None,
        INITIAL=initial is not None, DFINAL=dfinal is not None, BLOCK=block, **FUSION,
    )  # fmt: skip


def _clear_padding(cu_seqlens: Tensor, T: int, *outputs: Tensor) -> None:
    x, y, z = (outputs * 3)[:3]
    widths = [t.shape[2] * t.shape[3] if i < len(outputs) else 0 for i, t in enumerate((x, y, z))]
    segments.clear_padding_kernel[(-(-T // 64),)](
        x, y, z, cu_seqlens, cu_seqlens.numel() - 1, T, *widths, ROWS=64, BLOCK=1024, **FUSION
    )


@cache
def _precision(dtype: torch.dtype, tf32: bool) -> str:
    return "ieee" if dtype == torch.float32 and not tf32 else "tf32"


def _float32_precision(x: Tensor) -> str:
    """What PyTorch's float32 matmul precision asks for."""
    return _precision(x.dtype, torch.get_float32_matmul_precision() != "highest" if x.dtype == torch.float32 else True)


def _pick(D: int, E: int, *tensors: Tensor) -> launch.Tiles:
    x = tensors[0]
    return launch.tiles(launch.device(x)[0], D, E, x.dtype, all(launch.copyable(t) for t in tensors))


def _descriptors(tiles: launch.Tiles, pairs: list[tuple[Tensor, int]]) -> list[Any]:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    descriptors = []
    for x, width in pairs:
        strides = list(x.stride())
        for i in range(3):
            if x.shape[i] == 1:
                strides[i] = 8  # any that the engine takes
        layout = _shared_layout(tiles.C, width, x.dtype)
        descriptors.append(TensorDescriptor(x, list(x.shape), strides, [1, tiles.C, 1, width], layout))
    return descriptors


@cache
def _shared_layout(C: int, width: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(
        [1, C, 1, width], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


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

    grid = (cut.slots * H * e_tiles,)
    shape = (log_decay,)
    sizes = (cut.table, cut.per_sequence, cut.rows, T, H, D, E, scale)
    flags = {"C": tiles.C, "BD": tiles.BD, "BE": tiles.TE, "STAGES": tiles.stages, "PACKED": cut.table is not None}
    options = {"num_warps": tiles.warps, **FUSION}
    if tiles.hopper:
        from lightning_attention.kernels.triton import hopper

        kernel: Any = hopper.forward_kernel[grid]
        args: tuple[Any, ...] = (
            *_descriptors(tiles, [(q, tiles.BD), (k, tiles.BD), (v, tiles.TE), (out, tiles.TE)]),
            out, out.stride(0), out.stride(2), out.stride(1), *shape,
        )  # fmt: skip
    else:
        kernel = sweep.forward_kernel[grid]
        args = (q, k, v, out, *_strides(q, k, v), out.stride(0), *shape)
        flags |= {"EVEN_D": tiles.BD == D, "EVEN_E": E % tiles.TE == 0, "PRECISION": _float32_precision(q)}

    if before is not None:
        kernel(*args, before, before, *sizes, **flags, SEGMENTED=True, INITIAL=False, FINAL=True, OUTPUT=False, **options)
        _scan(cut, before, None, initial_state, None, log_decay, N, T)
    start = initial_state if before is None else before
    kernel(
        *args, _pointer(start, out), _pointer(final, out), *sizes, **flags, SEGMENTED=before is not None, INITIAL=start is not None,
        FINAL=final is not None, OUTPUT=True, **options,
    )  # fmt: skip
    if cu_seqlens is not None:
        _clear_padding(cu_seqlens, T, out)
    return out, final


def _pointer(x: Tensor | None, other: Tensor) -> Tensor:
    """Where a kernel's pointer is not used it still adds to it, so it gets another."""
    return other if x is None else x


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
    packed = cut.table is not None
    common = {"C": tiles.C, "BD": tiles.BD, "STAGES": tiles.stages, "PACKED": packed, **FUSION}
    common["num_warps"] = tiles.warps
    flags = {**common, "BE": tiles.BE, "TD": tiles.TD, "TE": tiles.TE}
    precision = _float32_precision(q)
    if tiles.hopper:
        from lightning_attention.kernels.triton import hopper

        kernel: Any = hopper.backward_kernel
        whole = [(q, tiles.BD), (k, tiles.BD), (v, tiles.BE), (dout, tiles.BE)]
        parts = [(q, tiles.TD), (k, tiles.TD), (dout, tiles.TE), (dq, tiles.TD), (dk, tiles.TD), (dv, tiles.TE)]
        args: tuple[Any, ...] = (*_descriptors(tiles, whole + parts), dq, dk, dv)
    else:
        kernel = sweep.backward_kernel
        args = (q, k, v, dout, dq, dk, dv, *_strides(q, k, v, dout))
        flags |= {
            "EVEN_D": tiles.BD == D, "EVEN_E": tiles.BE == E, "EVEN_TD": D % tiles.TD == 0,
            "EVEN_TE": E % tiles.TE == 0, "PRECISION": precision,
        }  # fmt: skip
    args = (*args, dq.stride(0), dv.stride(0), log_decay)

    if cut.cut:
        kernel[(cut.slots * H * (d_tiles + e_tiles),)](
            *args, before, after, before, after, *sizes, **flags, SEGMENTED=True, BEFORE=False, AFTER=False,
            AFTER_OUT=True, OUTPUT=False,
        )  # fmt: skip
        _scan(cut, before, after, initial_state, dfinal, log_decay, N, T)
    else:
        before, after = initial_state, dfinal
    kernel[(cut.slots * H * (2 * d_tiles + e_tiles),)](
        *args, *(_pointer(x, dq) for x in (before, after, None, dinitial)), *sizes, **flags, SEGMENTED=cut.cut, BEFORE=before is not None,
        AFTER=after is not None, AFTER_OUT=dinitial is not None, OUTPUT=True,
    )  # fmt: skip
    if cu_seqlens is not None:
        _clear_padding(cu_seqlens, T, dq, dk, dv)

    dlog_decay = None
    if need_dlog_decay:
        width = min(tiles.TE, 32)
        e_tiles = -(-E // width)
        partial = torch.empty(cut.slots, H, e_tiles, dtype=torch.float32, device=v.device)
        decay_gradient_kernel[(partial.numel(),)](
            q, k, v, dout, *_strides(q, k, v, dout), log_decay, _pointer(before, dq), _pointer(after, dq), partial,
            *sizes,
            **{**common, "C": min(tiles.C, 32), "STAGES": 2}, BE=width, EVEN_D=tiles.BD == D, EVEN_E=E % width == 0,
            SEGMENTED=cut.cut, BEFORE=before is not None, AFTER=after is not None, PRECISION=precision,
        )  # fmt: skip
        dlog_decay = partial.sum((0, 2))
    return dq, dk, dv, dlog_decay, dinitial
