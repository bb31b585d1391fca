"""Forward and backward on a GPU: what is launched, in which order, over which buffers."""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_attention.kernels.triton import launch, launcher, segments, sweep
from lightning_attention.kernels.triton.decay_gradient import decay_gradient_kernel


@cache
def hopper() -> Any:
    from lightning_attention.kernels.triton import hopper  # Gluon is not there on every platform

    return hopper


def float32_precision(x: Tensor) -> str:
    """What PyTorch's float32 matmul precision asks for."""
    return "ieee" if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def is_lazy(x: Tensor, batch_invariant: bool) -> bool:
    """Whether states are carried lazily (``part.advance``): where their bits matter, and need not be those of two calls
    one after the other.
    """
    return float32_precision(x) == "ieee" and not batch_invariant


@lru_cache(maxsize=1024)
def _forward_constants(
    tiles: launch.Tiles, packed: bool, flags: tuple[bool, ...], D: int, E: int, precision: str, lazy: bool
) -> dict[str, Any]:
    """``flags``: SEGMENTED, INITIAL, FINAL, OUTPUT."""
    values: dict[str, Any] = dict(zip(("SEGMENTED", "INITIAL", "FINAL", "OUTPUT"), flags, strict=True))
    values |= {"C": tiles.C, "BD": tiles.BD, "BE": tiles.TE, "PACKED": packed}
    values |= {"STAGES": launch.stages(tiles, flags[3])}
    if not tiles.hopper:
        values |= {"EVEN_D": tiles.BD == D, "EVEN_E": E % tiles.TE == 0}
        values |= {"PRECISION": precision, "LAZY": lazy}
    return values


class Forward:
    """The sweep of q, k and v [B, T, H, *] to out: ``own`` for the states that segments leave, ``output`` for out.

    ``initial`` and ``final`` are states of sequences, sequence i's in row ``slots[i]`` where there are slots, and of
    the same strides, each of them contiguous; where ``fresh[i]`` a sequence starts from zero.
    With ``places`` at most that many segments are swept at once, by programs that go on to others.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        log_decay: Tensor | None,
        scale: float,
        tiling: launch.Tiling,
        places: int | None = None,
        lazy: bool = False,
    ) -> None:
        _, T, H, D = k.shape
        E = v.shape[3]
        tiles, _, (of_q, of_k, of_v), (_, of_out) = tiling
        self._tiles, self._k, self._out, self._log_decay = tiles, k, out, log_decay
        self._sizes = (T, H, D, E, scale)
        self._row = row = H * E
        self._places, self._lazy = places, lazy
        if tiles.hopper:
            launcher.bind_context(k)
            C, BD, TE = tiles.C, tiles.BD, tiles.TE
            describe = launcher.Descriptor
            self._args: tuple[Any, ...] = (
                describe(q, of_q, C, BD), describe(k, of_k, C, BD), describe(v, of_v, C, TE),
                describe(out, of_out, C, TE), out, T * row, row, log_decay,
            )  # fmt: skip
        else:
            self._args = (q, k, v, out, *_strides(q, k, v), T * row, log_decay)

    def own(self, cut: segments.Segments, states: Tensor) -> None:
        """What each piece of a segment, but the last, would leave if it started from zero, as in ``Segments.room``."""
        self._run(cut, None, None, None, None, states, (False, False, True, False))

    def output(
        self,
        cut: segments.Segments,
        initial: Tensor | None,
        final: Tensor | None,
        between: Tensor | None,
        slots: Tensor | None = None,
        fresh: Tensor | None = None,
    ) -> None:
        """The outputs, from ``initial`` and, where sequences are cut, from the states ``between`` their segments."""
        flags = (cut.cut, initial is not None and cut.reads_sequences, final is not None, True)
        self._run(cut, initial, final, slots, fresh, between, flags)

    def _run(
        self,
        cut: segments.Segments,
        initial: Tensor | None,
        final: Tensor | None,
        slots: Tensor | None,
        fresh: Tensor | None,
        between: Tensor | None,
        flags: tuple[bool, ...],
    ) -> None:
        T, H, D, E, scale = self._sizes
        tiles, out, table = self._tiles, self._out, cut.table
        states = final if final is not None else initial
        state_strides = (H * D * E, D * E) if states is None else states.stride()[:2]
        args = (
            *self._args, out if initial is None else initial, out if final is None else final, *state_strides, slots,
            fresh, out if between is None else between, table, self._places and cut.count, cut.per_sequence, cut.rows,
            cut.piece, T, H, D, E, scale,
        )  # fmt: skip
        count = cut.count if flags[3] else cut.full * cut.pieces
        grid = (min(count, self._places or count) * H * -(-E // tiles.TE), 1, 1)
        packed = table is not None
        if tiles.hopper:
            index, dtype = self._k.device.index, self._k.dtype
            key: tuple[Any, ...] = (
                index, dtype, tiles, packed, flags, self._log_decay is None, self._row & 15, self._places is None,
            )  # fmt: skip
            if states is not None and (slots is not None or fresh is not None or states.dtype != torch.float32):
                key = (*key, *launcher.dtypes(states, slots, fresh))
            launcher.run(
                hopper().forward_kernel,
                grid,
                args,
                key,
                lambda: _forward_constants(tiles, packed, flags, D, E, "", False),
            )
        else:
            constants = _forward_constants(tiles, packed, flags, D, E, float32_precision(self._k), self._lazy)
            launcher.portable(sweep.forward_kernel, grid, args, constants, tiles)


@launcher.on_its_device
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
    log_decay, cu_seqlens = launcher.dense(log_decay), launcher.dense(cu_seqlens)
    B, T, H, D = k.shape
    E = v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = torch.empty(N, H, D, E, dtype=torch.float32, device=v.device) if output_final_state else None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if T == 0:
        if final is not None:
            final.zero_() if initial_state is None else final.copy_(initial_state)
        return out, final
    tiling = launch.tiling(q, k, v)
    tiles = tiling.tiles
    programs = H * -(-E // tiles.TE)
    cut = segments.cut(B, T, cu_seqlens, tiles.C, max(D, E), programs, tiling.places, batch_invariant)
    forward = Forward(q, k, v, out, log_decay, scale, tiling, lazy=is_lazy(k, batch_invariant))
    between = None
    if cut.cut:
        own, (between,) = cut.room(k, E)
        forward.own(cut, own[0])
        segments.scan(cut, own, (between,), initial_state, None, log_decay, cu_seqlens, N, T)
    forward.output(cut, initial_state, final, between)
    if cu_seqlens is not None:
        segments.clear_padding(cu_seqlens, T, out)
    return out, final


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in (x.stride(0), x.stride(1), x.stride(2))]


@lru_cache(maxsize=1024)
def _backward_constants(
    tiles: launch.Tiles, packed: bool, flags: tuple[bool, ...], D: int, E: int, precision: str, lazy: bool
) -> dict[str, Any]:
    """``flags``: SEGMENTED, INITIAL, DFINAL, DINITIAL, OUTPUT."""
    values: dict[str, Any] = dict(zip(("SEGMENTED", "INITIAL", "DFINAL", "DINITIAL", "OUTPUT"), flags, strict=True))
    values |= {"C": tiles.C, "BD": tiles.BD, "BE": tiles.BE, "TD": tiles.TD, "TE": tiles.TE}
    values |= {"PACKED": packed, "STAGES": launch.stages(tiles, flags[4])}
    if not tiles.hopper:
        values |= {"EVEN_D": tiles.BD == D, "EVEN_TD": D % tiles.TD == 0, "PRECISION": precision}
        values["LAZY"] = lazy
        values |= {"EVEN_E": tiles.BE == E, "EVEN_TE": E % tiles.TE == 0}
    return values


@launcher.on_its_device
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
    log_decay, cu_seqlens = launcher.dense(log_decay), launcher.dense(cu_seqlens)
    B, T, H, D = k.shape
    E = v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
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
    tiles, places, (of_q, of_k, of_v, of_dout), (of_d, of_e) = launch.tiling(q, k, v, dout)
    d_tiles, e_tiles = -(-D // tiles.TD), -(-E // tiles.TE)
    programs = H * (2 * d_tiles + e_tiles)
    cut = segments.cut(B, T, cu_seqlens, tiles.C, max(D, E), programs, places, batch_invariant)
    own, between = cut.room(k, E, 2) if cut.cut else ((dq, dq), (dq, dq))
    table = cut.table
    states = [dq if x is None else x for x in (initial_state, dfinal, dinitial)]
    sizes = (table, cut.per_sequence, cut.rows, cut.piece, T, H, D, E, scale)
    packed, d_row, e_row = table is not None, H * D, H * E
    if tiles.hopper:
        launcher.bind_context(k)
        C, BD, BE, TD, TE = tiles.C, tiles.BD, tiles.BE, tiles.TD, tiles.TE
        describe = launcher.Descriptor
        args: tuple[Any, ...] = (
            describe(q, of_q, C, BD), describe(k, of_k, C, BD), describe(v, of_v, C, BE),
            describe(dout, of_dout, C, BE), describe(q, of_q, C, TD), describe(k, of_k, C, TD),
            describe(dout, of_dout, C, TE), describe(dq, of_d, C, TD), describe(dk, of_d, C, TD),
            describe(dv, of_e, C, TE), dq, dk, dv, T * d_row, d_row, T * e_row, e_row, log_decay, *states,
        )  # fmt: skip
    else:
        args = (q, k, v, dout, dq, dk, dv, *_strides(q, k, v, dout), T * d_row, T * e_row, log_decay, *states)

    reads = cut.reads_sequences

    def sweep_all(output: bool) -> None:
        flags = (
            output and cut.cut, output and reads and initial_state is not None, output and reads and dfinal is not None,
            output and dinitial is not None, output,
        )  # fmt: skip
        count = cut.count if output else cut.full * cut.pieces + cut.count - cut.full
        grid = (count * H * (d_tiles + e_tiles + output * d_tiles), 1, 1)
        given = (*args, *(between if output else own), *sizes)
        if tiles.hopper:
            key = (k.device.index, k.dtype, tiles, packed, flags, log_decay is None, d_row & 15, e_row & 15)
            launcher.run(
                hopper().backward_kernel,
                grid,
                given,
                key,
                lambda: _backward_constants(tiles, packed, flags, D, E, "", False),
            )
        else:
            lazy = is_lazy(k, batch_invariant)
            constants = _backward_constants(tiles, packed, flags, D, E, float32_precision(k), lazy)
            launcher.portable(sweep.backward_kernel, grid, given, constants, tiles)

    if cut.cut:
        sweep_all(False)
        segments.scan(cut, own, between, initial_state, dfinal, log_decay, cu_seqlens, N, T)
    sweep_all(True)
    if cu_seqlens is not None:
        segments.clear_padding(cu_seqlens, T, dq, dk, dv)

    dlog_decay = None
    if need_dlog_decay:
        width = min(tiles.TE, 32)
        e_tiles = -(-E // width)
        partials = torch.empty(cut.count, H, e_tiles, dtype=torch.float32, device=v.device)
        constants = {
            "C": 16 if q.dtype == torch.float16 else min(tiles.C, 32), "BD": tiles.BD, "BE": width, "STAGES": 2,
            "EVEN_D": tiles.BD == D, "EVEN_E": E % width == 0, "PACKED": packed, "SEGMENTED": cut.cut,
            "INITIAL": reads and initial_state is not None, "DFINAL": reads and dfinal is not None,
            "PRECISION": float32_precision(k),
        }  # fmt: skip
        initial, ahead, _ = states
        args = (
            q, k, v, dout, *_strides(q, k, v, dout), log_decay, initial, ahead, *between, partials, table,
            cut.per_sequence, cut.rows, T, H, D, E, scale,
        )  # fmt: skip
        launcher.portable(decay_gradient_kernel, (partials.numel(), 1, 1), args, constants, tiles)
        dlog_decay = partials.sum((0, 2))
    return dq, dk, dv, dlog_decay, dinitial
