"""The one loop that everything is made of: a sweep over the blocks of a sequence with the state in registers.

    sweep(a, b, c):   o_t = scale · Σ_{s ≤ t} λ^(t−s) (a_t · b_s) c_s        (and with time reversed, s ≥ t)

    o = sweep(q, k, v);   dq = sweep(do, v, k);   dk = reverse sweep(v, do, q);   dv = reverse sweep(k, q, do)

A program owns one head of one sequence (or one segment of it) and some columns of c, and keeps its part of the state
Σ λ^… cᵀ b in float32. It is kept transposed, c's columns first: so both products that read what a product just made,
(state)(aᵀ) and the update, take it as the left operand, which matrix units read from registers. Only the C×C scores
pass through shared memory (8 KB a block in 16 bits, where the state would be 16 to 32 KB).

This is the portable form, for any device that Triton compiles for and any strides; ``hopper.py`` is the same loop with
Hopper's copy engine and asynchronous products.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch, roles
from lightning_attention.kernels.triton.numerics import advance, carried_units, power_below, whole_and_rest
from lightning_attention.kernels.triton.roles import Operands, first_state, heads_read, state_pointers, widths
from lightning_attention.kernels.triton.sweeps.interface import Sweep
from lightning_attention.kernels.triton.work import (
    Pool,
    Segmentation,
    Shape,
    is_past,
    is_within,
    nearest_border,
)


class Input(NamedTuple):
    """A tensor [B, T, H, width] that is read."""

    pointer: tl.tensor
    batch_stride: tl.tensor
    row_stride: tl.tensor
    head_stride: tl.tensor


class Output(NamedTuple):
    """A contiguous tensor that is written."""

    pointer: tl.tensor
    batch_stride: tl.tensor


@triton.jit
def load_rows(x, start, stop, column, width, C: tl.constexpr, BW: tl.constexpr, EVEN: tl.constexpr, row_stride):
    """Rows start … start+C and columns column … column+BW of [T, width]; zero past either end, and not read there."""
    row = start + tl.arange(0, C)
    col = column + tl.arange(0, BW)
    inside = (row < stop)[:, None]
    if not EVEN:
        inside = inside & (col < width)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * row_stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def rows_of(x, batch, head):
    """Where a head's rows begin."""
    return x.pointer + head * x.head_stride + batch * x.batch_stride


@triton.jit
def sweep(a, b, c, out, decay_grad, rows, begin, end, shape, rate, scale, TILES: tl.constexpr, PACKED: tl.constexpr,  # noqa: ARG001
          TRANSPOSED: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """The loop, as ``roles.py`` calls it: from ``first_state`` to the state at ``end``.

    With time reversed the state is that of the rows after. Where TILES.lazy it is carried as ``advance`` says.
    """
    C: tl.constexpr = TILES.C
    WIDTH: tl.constexpr = TILES.BE if TRANSPOSED else TILES.BD
    TILE: tl.constexpr = TILES.TD if TRANSPOSED else TILES.TE
    EVEN_B: tl.constexpr = TILES.even_BE if TRANSPOSED else TILES.even_BD
    EVEN_C: tl.constexpr = TILES.even_TD if TRANSPOSED else TILES.even_TE
    PRECISION: tl.constexpr = TILES.precision
    HALF: tl.constexpr = b.pointer.dtype.element_ty == tl.float16
    b_width, c_width = widths(shape, TRANSPOSED)
    b_head, c_head = heads_read(rows, TILES, TRANSPOSED)
    b_rows = rows_of(b, rows.batch, b_head)
    c_rows = rows_of(c, rows.batch, c_head)
    start = rows.start
    stop = rows.stop
    column = rows.column
    col = column + tl.arange(0, TILE)
    state = first_state(tl.zeros([TILE, WIDTH], tl.float32), begin, tl.arange(0, WIDTH), col, shape, TRANSPOSED,
                        TILES.columns_first)  # fmt: skip
    unit, weight_scale = carried_units(rate, scale, HALF, REVERSE)
    if HALF and REVERSE:
        state *= tl.exp2(-unit)
    elapsed = 0
    if decay_grad is not None:
        partner_rows = rows_of(decay_grad.partner, rows.batch, c_head)
        total = tl.zeros([C], tl.float32)
        if REVERSE:
            derivative = tl.zeros([TILE, WIDTH], tl.float32)
            met = tl.zeros([TILE], tl.float32)
    row = tl.arange(0, C)
    gap = row[None, :] - row[:, None]
    if REVERSE:
        gap = -gap
    mask = tl.where(gap >= 0, tl.exp2(rate * tl.maximum(gap, 0)) * scale, 0.0)
    blocks = tl.cdiv(stop - start, C)
    for n in tl.range(0, blocks, num_stages=TILES.stages):
        at = start + n * C
        if REVERSE:
            at = start + (blocks - 1 - n) * C
        tokens = tl.minimum(stop - at, C)
        bt = load_rows(b_rows, at, stop, 0, b_width, C, WIDTH, EVEN_B, b.row_stride)
        ct = tl.trans(load_rows(c_rows, at, stop, column, c_width, C, TILE, EVEN_C, c.row_stride))
        # Rows from the start of the block, 1..m, and to its end, m−1..0; a row past the end is clamped, and zero in c.
        from_start = row + 1
        to_end = tl.maximum(tokens - 1 - row, 0)
        if rows.borders is not None:
            nearest = nearest_border(rows.borders, at, at + tokens, REVERSE)
            is_kept = is_past(nearest, at, at + tokens, REVERSE)
        if a is not None:
            a_rows = rows_of(a, rows.batch, b_head)
            at_ = tl.trans(load_rows(a_rows, at, stop, 0, b_width, C, WIDTH, EVEN_B, a.row_stride))
            scores = tl.dot(bt, at_, input_precision=PRECISION) * mask
            leaving = tl.exp2(rate * to_end)
            if HALF:  # rows of the state, each times a power of two that makes it fit
                power, inverse = power_below(tl.max(tl.abs(state), 1))
                o = tl.dot((state * inverse[:, None]).to(bt.dtype), at_) * power[:, None]
            else:
                o = tl.dot(state.to(bt.dtype), at_, input_precision=PRECISION)
            if REVERSE:
                o = o * tl.exp2(rate * (to_end + elapsed) + unit)[None, :]
            else:
                o = o * (tl.exp2(rate * (from_start + elapsed) + unit) * scale)[None, :]
            if rows.borders is not None:
                # Else all rows are of one document. Selecting without a branch spills 16 bytes more, float32, D = 128.
                if not is_kept:
                    border = tl.load(rows.borders + at + tl.minimum(row, tokens - 1))
                    scores = tl.where(is_within((at + row)[:, None], border[None, :], REVERSE), scores, 0.0)
                    goes_past = is_past(border, at, at + tokens, REVERSE)
                    o = tl.where(goes_past[None, :], o, 0.0)
                    leaving = tl.where(goes_past, leaving, 0.0)
            if decay_grad is not None:
                partner = tl.trans(load_rows(partner_rows, at, stop, column, c_width, C, TILE, EVEN_C,
                                             decay_grad.partner.row_stride))  # fmt: skip
                sent_on = tl.sum(o * partner.to(tl.float32), 0)  # or got from there: past the edge of the block
                if REVERSE:
                    total += sent_on * to_end
                    left = (partner.to(tl.float32) * leaving[None, :]).to(partner.dtype)
                    part = tl.dot(left, tl.trans(at_), input_precision=PRECISION)
                    met += tl.sum(derivative * part, 1) * tl.exp2(rate * elapsed + unit)
                else:
                    total += sent_on * from_start
                    within = tl.dot(tl.trans(ct), partner, input_precision=PRECISION)
                    total += tl.sum(scores * within * gap, 0)
            o = tl.dot(ct, scores.to(ct.dtype), o, input_precision=PRECISION)
            out_rows = out.pointer + rows.batch * out.batch_stride + rows.head * c_width
            where = out_rows + (at + row).to(tl.int64)[:, None] * (shape.H * c_width) + col[None, :]
            inside = (row < tokens)[:, None]
            if not EVEN_C:
                inside = inside & (col < c_width)[None, :]
            tl.store(where, tl.trans(o.to(bt.dtype)), mask=inside)
        if TILES.lazy:
            elapsed, whole, rest = advance(rate, elapsed, tokens)
        else:
            whole, rest = whole_and_rest(rate * tokens * 0.6931471805599453)
        weight = to_end
        if REVERSE:
            weight = from_start
        if decay_grad is not None:
            if REVERSE:
                derivative += state * tokens
                derivative = derivative * whole + derivative * rest
        if rows.borders is not None:
            state = tl.where(is_kept, state, 0.0)
            if decay_grad is not None:
                if REVERSE:
                    derivative = tl.where(is_kept, derivative, 0.0)
        weighted = ct.to(tl.float32)
        weights = tl.exp2(rate * (weight - elapsed)) * weight_scale
        if rows.borders is not None:
            weights = tl.where(is_within(at + row, nearest, REVERSE), weights, 0.0)
        weighted = (weighted * weights[None, :]).to(ct.dtype)
        if PRECISION != "tf32":  # one sum a block rounds a long state less often than one a row
            state = state * whole + (state * rest + tl.dot(weighted, bt, input_precision=PRECISION))
        else:
            state = tl.dot(weighted, bt, state * whole + state * rest, input_precision=PRECISION)
    if decay_grad is not None:
        found = tl.sum(total, 0)
        if REVERSE:
            if decay_grad.is_entered:
                where, exists = state_pointers(decay_grad.entered, tl.arange(0, WIDTH), col, shape, TRANSPOSED)
                entered = tl.load(where, mask=exists, other=0.0)
                met += tl.sum(derivative * entered, 1) * tl.exp2(rate * elapsed + unit)
            found += tl.sum(met, 0)
        tl.store(decay_grad.sum, found)
    if end.final is not None:
        if end.is_stored:
            left, exists = state_pointers(end.final + end.final_offset, tl.arange(0, WIDTH), col, shape, TRANSPOSED,
                                          TILES.columns_first)  # fmt: skip
            state *= tl.exp2(rate * elapsed + unit)
            tl.store(left, state.to(end.final.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["state_slot_stride", "state_head_stride", "segments_per_sequence", "segment_rows",
                               "begins", "ends", "segment_count", "T"])  # fmt: skip
def forward_kernel(q, q_batch_stride: "i64", q_row_stride, q_head_stride: "i64", k, k_batch_stride: "i64", k_row_stride,
                   k_head_stride: "i64", v, v_batch_stride: "i64", v_row_stride, v_head_stride: "i64", out,
                   out_batch_stride: "i64", log_decay, initial, final, state_slot_stride: "i64",
                   state_head_stride: "i64", slots, fresh, boundary_states, segment_table, segments_per_sequence,
                   segment_rows, begins, ends, segment_count, T, H, D, E, scale, TILES: tl.constexpr,
                   PERSISTENT: tl.constexpr):  # fmt: skip
    roles.forward(sweep, Input(q, q_batch_stride, q_row_stride, q_head_stride),
                  Input(k, k_batch_stride, k_row_stride, k_head_stride),
                  Input(v, v_batch_stride, v_row_stride, v_head_stride), Output(out, out_batch_stride), log_decay,
                  Pool(initial, final, state_slot_stride, state_head_stride, slots, fresh), boundary_states,
                  Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends), Shape(T, H, D, E),
                  scale, segment_count, TILES, PERSISTENT)  # fmt: skip


@triton.jit(do_not_specialize=["segments_per_sequence", "segment_rows", "begins", "ends", "T"])
def backward_kernel(q, q_batch_stride: "i64", q_row_stride, q_head_stride: "i64", k, k_batch_stride: "i64",
                    k_row_stride, k_head_stride: "i64", v, v_batch_stride: "i64", v_row_stride, v_head_stride: "i64",
                    dout, dout_batch_stride: "i64", dout_row_stride, dout_head_stride: "i64", dq,
                    dq_batch_stride: "i64", dk, dk_batch_stride: "i64", dv, dv_batch_stride: "i64", log_decay, initial,
                    dfinal, dinitial, states_before, grads_after, decay_sums, segment_table, segments_per_sequence,
                    segment_rows, begins, ends, T, H, D, E, scale, TILES: tl.constexpr):  # fmt: skip
    operands = Operands(Input(q, q_batch_stride, q_row_stride, q_head_stride),
                        Input(k, k_batch_stride, k_row_stride, k_head_stride),
                        Input(v, v_batch_stride, v_row_stride, v_head_stride),
                        Input(dout, dout_batch_stride, dout_row_stride, dout_head_stride))  # fmt: skip
    roles.backward(sweep, operands, operands, Output(dq, dq_batch_stride), Output(dk, dk_batch_stride),
                   Output(dv, dv_batch_stride), log_decay, initial, dfinal, dinitial, states_before, grads_after,
                   decay_sums, Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends),
                   Shape(T, H, D, E), scale, TILES)  # fmt: skip


@triton.jit(do_not_specialize=["segments_per_sequence", "segment_rows", "begins", "ends", "piece_rows",
                               "last_piece_rows", "piece_count",
                               "T"])  # fmt: skip
def states_kernel(k, k_batch_stride: "i64", k_row_stride, k_head_stride: "i64", v, v_batch_stride: "i64", v_row_stride,
                  v_head_stride: "i64", q, q_batch_stride: "i64", q_row_stride, q_head_stride: "i64", dout,
                  dout_batch_stride: "i64", dout_row_stride, dout_head_stride: "i64", log_decay, local_before,
                  local_after, final, segment_table, segments_per_sequence, segment_rows, begins, ends, piece_rows,
                  last_piece_rows,
                  piece_count, T, H, D, E, scale, TILES: tl.constexpr, PERSISTENT: tl.constexpr):  # fmt: skip
    roles.states(sweep, Input(k, k_batch_stride, k_row_stride, k_head_stride),
                 Input(v, v_batch_stride, v_row_stride, v_head_stride),
                 Input(q, q_batch_stride, q_row_stride, q_head_stride),
                 Input(dout, dout_batch_stride, dout_row_stride, dout_head_stride), log_decay, local_before,
                 local_after, final, Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends),
                 piece_rows, last_piece_rows, Shape(T, H, D, E), scale, piece_count, TILES, PERSISTENT)  # fmt: skip


@triton.jit(do_not_specialize=["slots", "fresh", "cu_seqlens", "first_boundary", "snapshot_at", "snapshot_slots",
                               "per_sequence", "segment_rows", "H"])  # fmt: skip
def snapshot_kernel(k, k_batch_stride: "i64", k_row_stride, k_head_stride: "i64", v, v_batch_stride: "i64",
                    v_row_stride, v_head_stride: "i64", log_decay, pool, state_slot_stride: "i64",
                    state_head_stride: "i64", slots, fresh, boundary_states, cu_seqlens, first_boundary, snapshot_at,
                    snapshot_slots, per_sequence, segment_rows, T, H, D, E, TILES: tl.constexpr):  # fmt: skip
    roles.snapshot(sweep, Input(k, k_batch_stride, k_row_stride, k_head_stride),
                   Input(v, v_batch_stride, v_row_stride, v_head_stride), log_decay,
                   Pool(pool, pool, state_slot_stride, state_head_stride, slots, fresh), boundary_states, cu_seqlens,
                   first_boundary, snapshot_at, snapshot_slots, per_sequence, segment_rows, Shape(T, H, D, E),
                   TILES)  # fmt: skip


def read(x: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (None, 0, 0, 0) if x is None else (x, x.stride(0), x.stride(1), x.stride(2))


def narrow(*_: Any) -> tuple[Any, ...]:
    return ()  # any columns of a tensor can be read


def write(x: Tensor, *_: Any) -> tuple[Any, ...]:
    return x, x.stride(0)


SWEEP = Sweep(
    forward_kernel, backward_kernel, states_kernel, snapshot_kernel, read, read, narrow, write, dispatch.specialized
)
