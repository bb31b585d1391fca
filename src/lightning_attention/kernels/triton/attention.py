"""Forward and backward on a GPU: what is launched, in which order, over which buffers."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from lightning_attention.kernels.triton import launch, segments, sweep
from lightning_attention.kernels.triton.decay_gradient import decay_gradient_kernel

#: Rows, at most, in a segment of a packed batch, whose lengths nobody knows. 131072 rows at H 32, D 128, forward, one
#: sequence of 98304 among 64 others: 1.45 ms (long one first), 1.69 with 4096, 1.93 with 2048; dense 1.26.
PACKED_SEGMENT = 16384


class Segments(NamedTuple):
    """The segments of a call. rows: in each but a sequence's last; per_sequence: of a dense batch; slots: in all."""

    rows: int
    per_sequence: int
    slots: int
    cut: bool
    table: Tensor | None
    first: Tensor | None


def _cut(
    k: Tensor,
    cu_seqlens: Tensor | None,
    tiles: launch.Tiles,
    programs: int,
    multiprocessors: int,
    batch_invariant: bool,
) -> Segments:
    """``programs``: how many one segment makes for one head."""
    B, T, H, _ = k.shape
    rows = -(-T // tiles.C) * tiles.C
    if not batch_invariant:
        places = multiprocessors * tiles.per_multiprocessor
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
        segments.plan_kernel, (1, 1, 1), (cu_seqlens, table, first, N, rows, slots),
        (k.device.index, cu_seqlens.dtype), lambda: {"BLOCK": 1024},
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
    flags = (cut.table is not None, before is not None, after is not None, initial is not None, dfinal is not None)
    args = (
        *(_pointer(x, states) for x in (before, after, initial, dfinal)), log_decay, cut.table, cut.first,
        cut.per_sequence, cut.rows, T, H, D * E,
    )  # fmt: skip
    launch.run(
        segments.scan_kernel, (N, H, -(-D * E // block)), args, (states.device.index, log_decay is None, block, flags),
        lambda: {**dict(zip(("PACKED", "BEFORE", "AFTER", "INITIAL", "DFINAL"), flags, strict=True)), "BLOCK": block},
    )  # fmt: skip


def _clear_padding(cu_seqlens: Tensor, T: int, *outputs: Tensor) -> None:
    x, y, z = (outputs * 3)[:3]
    widths = [t.shape[2] * t.shape[3] if i < len(outputs) else 0 for i, t in enumerate((x, y, z))]
    args = (x, y, z, cu_seqlens, cu_seqlens.numel() - 1, T, *widths)
    key = (x.device.index, x.dtype, cu_seqlens.dtype)
    launch.run(segments.clear_padding_kernel, (-(-T // 64), 1, 1), args, key, lambda: {"ROWS": 64, "BLOCK": 1024})


@cache
def _hopper() -> Any:
    from lightning_attention.kernels.triton import hopper  # Gluon is not there on every platform

    return hopper


def _float32_precision(x: Tensor) -> str:
    """What PyTorch's float32 matmul precision asks for."""
    return "ieee" if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


Result = TypeVar("Result")


def _on_its_device(run: Callable[..., Result]) -> Callable[..., Result]:
    """Triton launches on the current device, which need not be the one that the tensors are on."""

    @wraps(run)
    def launched(*args: Any) -> Result:
        x = args[2]  # k, or q
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(x.device):
            return run(*args)

    return launched


@_on_its_device
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
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = torch.empty(N, H, D, E, dtype=torch.float32, device=v.device) if output_final_state else None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if T == 0:
        if final is not None:
            final.zero_() if initial_state is None else final.copy_(initial_state)
        return out, final
    capability, multiprocessors = launch.device(k)
    aligned = launch.copyable(q) and launch.copyable(k) and launch.copyable(v) and launch.copyable(out)
    tiles = launch.tiles(capability, D, E, k.dtype, aligned)
    e_tiles = -(-E // tiles.TE)
    cut = _cut(k, cu_seqlens, tiles, e_tiles, multiprocessors, batch_invariant)
    before = torch.empty(cut.slots, H, D, E, dtype=torch.float32, device=v.device) if cut.cut else None
    grid = (cut.slots * H * e_tiles, 1, 1)
    sizes = (cut.table, cut.per_sequence, cut.rows, T, H, D, E, scale)
    packed, o_row = cut.table is not None, H * E
    if tiles.hopper:
        launch.bind_context(k)
        C = tiles.C
        args: tuple[Any, ...] = (
            launch.Descriptor(q, C, tiles.BD), launch.Descriptor(k, C, tiles.BD), launch.Descriptor(v, C, tiles.TE),
            launch.Descriptor(out, C, tiles.TE), out, T * o_row, o_row, log_decay,
        )  # fmt: skip
    else:
        args = (q, k, v, out, *_strides(q, k, v), T * o_row, log_decay)

    def sweep_all(initial: Tensor | None, final: Tensor | None, segmented: bool, output: bool) -> None:
        flags = (segmented, initial is not None, final is not None, output)
        every = (*args, _pointer(initial, out), _pointer(final, out), *sizes)

        def constants() -> dict[str, Any]:
            values: dict[str, Any] = dict(zip(("SEGMENTED", "INITIAL", "FINAL", "OUTPUT"), flags, strict=True))
            values |= {"C": tiles.C, "BD": tiles.BD, "BE": tiles.TE, "PACKED": packed}
            values |= {"STAGES": launch.stages(tiles, output)}
            if not tiles.hopper:
                values |= {"EVEN_D": tiles.BD == D, "EVEN_E": E % tiles.TE == 0, "PRECISION": _float32_precision(k)}
            return values

        if tiles.hopper:
            key = (k.device.index, k.dtype, tiles, packed, flags, log_decay is None, o_row & 15)
            launch.run(_hopper().forward_kernel, grid, every, key, constants)
        else:
            _launch(sweep.forward_kernel, grid, every, constants(), tiles.warps)

    if before is not None:
        sweep_all(None, before, True, False)
        _scan(cut, before, None, initial_state, None, log_decay, N, T)
    sweep_all(initial_state if before is None else before, final, cut.cut, True)
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


@_on_its_device
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
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
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
    capability, multiprocessors = launch.device(k)
    aligned = all(launch.copyable(x) for x in (q, k, v, dout, dq, dv))
    tiles = launch.tiles(capability, D, E, k.dtype, aligned)
    d_tiles, e_tiles = -(-D // tiles.TD), -(-E // tiles.TE)
    cut = _cut(k, cu_seqlens, tiles, 2 * d_tiles + e_tiles, multiprocessors, batch_invariant)
    before = after = None
    if cut.cut:
        before, after = torch.empty(2, cut.slots, H, D, E, dtype=torch.float32, device=v.device)
    sizes = (cut.table, cut.per_sequence, cut.rows, T, H, D, E, scale)
    packed, d_row, e_row = cut.table is not None, H * D, H * E
    if tiles.hopper:
        launch.bind_context(k)
        C, BD, BE, TD, TE = tiles.C, tiles.BD, tiles.BE, tiles.TD, tiles.TE
        pairs = (
            (q, BD), (k, BD), (v, BE), (dout, BE), (q, TD), (k, TD), (dout, TE), (dq, TD), (dk, TD), (dv, TE),
        )  # fmt: skip
        descriptors = [launch.Descriptor(x, C, width) for x, width in pairs]
        args: tuple[Any, ...] = (*descriptors, dq, dk, dv, T * d_row, d_row, T * e_row, e_row, log_decay)
    else:
        args = (q, k, v, dout, dq, dk, dv, *_strides(q, k, v, dout), T * d_row, T * e_row, log_decay)

    def sweep_all(
        before: Tensor | None, after: Tensor | None, before_out: Tensor | None, after_out: Tensor | None, output: bool
    ) -> None:
        flags = (cut.cut, before is not None, after is not None, after_out is not None, output)
        every = (*args, *(_pointer(x, dq) for x in (before, after, before_out, after_out)), *sizes)
        grid = (cut.slots * H * (d_tiles + e_tiles + output * d_tiles), 1, 1)

        def constants() -> dict[str, Any]:
            names = ("SEGMENTED", "BEFORE", "AFTER", "AFTER_OUT", "OUTPUT")
            values: dict[str, Any] = dict(zip(names, flags, strict=True))
            values |= {"C": tiles.C, "BD": tiles.BD, "BE": tiles.BE, "TD": tiles.TD, "TE": tiles.TE}
            values |= {"PACKED": packed, "STAGES": launch.stages(tiles, output)}
            if not tiles.hopper:
                values |= {"EVEN_D": tiles.BD == D, "EVEN_TD": D % tiles.TD == 0, "PRECISION": _float32_precision(k)}
                values |= {"EVEN_E": tiles.BE == E, "EVEN_TE": E % tiles.TE == 0}
            return values

        if tiles.hopper:
            key = (k.device.index, k.dtype, tiles, packed, flags, log_decay is None, d_row & 15, e_row & 15)
            launch.run(_hopper().backward_kernel, grid, every, key, constants)
        else:
            _launch(sweep.backward_kernel, grid, every, constants(), tiles.warps)

    if cut.cut:
        sweep_all(None, None, before, after, False)
        _scan(cut, before, after, initial_state, dfinal, log_decay, N, T)
    else:
        before, after = initial_state, dfinal
    sweep_all(before, after, None, dinitial, True)
    if cu_seqlens is not None:
        _clear_padding(cu_seqlens, T, dq, dk, dv)

    dlog_decay = None
    if need_dlog_decay:
        width = min(tiles.TE, 32)
        e_tiles = -(-E // width)
        partials = torch.empty(cut.slots, H, e_tiles, dtype=torch.float32, device=v.device)
        constants = {
            "C": min(tiles.C, 32), "BD": tiles.BD, "BE": width, "STAGES": 2, "EVEN_D": tiles.BD == D,
            "EVEN_E": E % width == 0, "PACKED": packed, "SEGMENTED": cut.cut, "BEFORE": before is not None,
            "AFTER": after is not None, "PRECISION": _float32_precision(k),
        }  # fmt: skip
        states = [_pointer(x, dq) for x in (before, after)]
        args = (q, k, v, dout, *_strides(q, k, v, dout), log_decay, *states, partials, *sizes)
        _launch(decay_gradient_kernel, (partials.numel(), 1, 1), args, constants, tiles.warps)
        dlog_decay = partials.sum((0, 2))
    return dq, dk, dv, dlog_decay, dinitial
