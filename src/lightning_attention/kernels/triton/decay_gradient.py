"""The gradient of log_decay, computed only where it is asked for.

Written as Σ_t t (q_t · dq_t − k_t · dk_t) it is a difference of sums that grow with the sequence, and useless in low
precision. Here the derivative of the state goes forward with the state: with R = ∂S/∂log λ, and i, r = 1..m in a block,

    ∂o_i = Σ_j (i−j) λ^(i−j) (q_i · k_j) v_j + λ^i q_i (R + i S)
    R ← λ^m (R + m S) + Σ_r (m−r) λ^(m−r) k_rᵀ v_r

every weight is positive, and the result is Σ_t do_t · ∂o_t plus the final state's ⟨dS, R⟩. A segment starts from R = 0:
what it does to the state after it is weighed with that state's gradient, which the backward pass has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import log2_decay, whole_and_rest
from lightning_attention.kernels.triton.plan import Plan
from lightning_attention.kernels.triton.roles import Begin, first_state
from lightning_attention.kernels.triton.sweeps.portable import Input, load_rows, read, rows_of
from lightning_attention.kernels.triton.tiling import Tiles, with_tile
from lightning_attention.kernels.triton.work import Segmentation, Shape, find_segment, is_whole_sequence


def decay_gradient(
    plan: Plan, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, log_decay: Tensor | None,
    initial: Tensor | None, dfinal: Tensor | None, states_before: Tensor | None, grads_after: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """[H] float32, from the states that a backward pass of the same plan has used."""
    (_, T, H, E), D = v.shape, k.shape[3]
    tiles = tiles._replace(C=16 if q.dtype == torch.float16 else min(tiles.C, 32), stages=2)
    tiles = with_tile(tiles, D, E, min(tiles.TE, 32))
    partial = torch.empty(plan.segment_count, H, -(-E // tiles.TE), dtype=torch.float32, device=v.device)
    args = (
        *read(q), *read(k), *read(v), *read(dout), log_decay, initial, dfinal, states_before, grads_after, partial,
        plan.segment_table, plan.segments_per_sequence, plan.segment_rows, T, H, D, E, scale,
    )  # fmt: skip
    dispatch.specialized(decay_gradient_kernel, (partial.numel(), 1, 1), args, (tiles,), tiles.warps, q.get_device())
    return partial.sum((0, 2))


@triton.jit(do_not_specialize=["segments_per_sequence", "segment_rows", "T"])
def decay_gradient_kernel(q, q_batch_stride: "i64", q_row_stride, q_head_stride: "i64", k, k_batch_stride: "i64",
                          k_row_stride, k_head_stride: "i64", v, v_batch_stride: "i64", v_row_stride,
                          v_head_stride: "i64", dout, dout_batch_stride: "i64", dout_row_stride,
                          dout_head_stride: "i64", log_decay, initial, dfinal, states_before, grads_after, partial,
                          segment_table, segments_per_sequence, segment_rows, T, H, D, E, scale,
                          TILES: tl.constexpr):  # fmt: skip
    """partial [segment_count, H, tiles]: each program's part of the sum.

    float16 inputs are multiplied in TF32, which has their bits and float32's range: R grows like T^1.5 where nothing
    decays, past 65504 from T = 1024 on, and with strong decays all of it is next to nothing.
    """
    DTYPE: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float16 else q.dtype.element_ty
    C: tl.constexpr = TILES.C
    BD: tl.constexpr = TILES.BD
    TE: tl.constexpr = TILES.TE
    PRECISION: tl.constexpr = TILES.precision
    SPLIT: tl.constexpr = states_before is not None
    tiles = tl.cdiv(E, TE)
    pid = tl.program_id(0)
    column = pid % tiles * TE
    head = pid // tiles % H
    shape = Shape(T, H, D, E)
    plan = Segmentation(segment_table, segments_per_sequence, segment_rows)
    segment = find_segment(plan, pid // tiles // H, T)
    if segment.sequence < 0:
        tl.store(partial + pid, 0.0)
        return
    rate = log2_decay(log_decay, head)
    q_rows = rows_of(Input(q, q_batch_stride, q_row_stride, q_head_stride), segment.batch, head // TILES.group)
    k_rows = rows_of(Input(k, k_batch_stride, k_row_stride, k_head_stride), segment.batch, head // TILES.group)
    v_rows = rows_of(Input(v, v_batch_stride, v_row_stride, v_head_stride), segment.batch, head)
    dout_rows = rows_of(Input(dout, dout_batch_stride, dout_row_stride, dout_head_stride), segment.batch, head)
    of_sequence = (segment.sequence.to(tl.int64) * H + head) * D * E
    of_segment = (segment.boundary_index.to(tl.int64) * H + head) * D * E
    is_whole = is_whole_sequence(segment, plan, SPLIT)
    d = tl.arange(0, BD)
    e = column + tl.arange(0, TE)
    zero = tl.zeros([TE, BD], tl.float32)
    state = first_state(
        zero, Begin(initial, of_sequence, is_whole, states_before, of_segment, is_whole), d, e, shape, False
    )
    drift = zero
    total = tl.zeros([C], tl.float32)
    row = tl.arange(0, C)
    gap = row[None, :] - row[:, None]
    mask = tl.where(gap >= 0, tl.exp2(rate * tl.maximum(gap, 0)) * gap, 0.0)
    from_start = tl.exp2(rate * (row + 1))
    for n in tl.range(0, tl.cdiv(segment.stop - segment.start, C), num_stages=TILES.stages):
        at = segment.start + n * C
        tokens = tl.minimum(segment.stop - at, C)
        qt = tl.trans(load_rows(q_rows, at, segment.stop, 0, D, C, BD, TILES.even_BD, q_row_stride).to(DTYPE))
        kt = load_rows(k_rows, at, segment.stop, 0, D, C, BD, TILES.even_BD, k_row_stride).to(DTYPE)
        vt = tl.trans(load_rows(v_rows, at, segment.stop, column, E, C, TE, TILES.even_TE, v_row_stride).to(DTYPE))
        gt = tl.trans(load_rows(dout_rows, at, segment.stop, column, E, C, TE, TILES.even_TE, dout_row_stride))
        scores = tl.dot(kt, qt, input_precision=PRECISION) * mask
        out = tl.dot(drift.to(qt.dtype), qt, input_precision=PRECISION) * from_start[None, :]
        out += tl.dot(state.to(qt.dtype), qt, input_precision=PRECISION) * (from_start * (row + 1))[None, :]
        out = tl.dot(vt, scores.to(vt.dtype), out, input_precision=PRECISION)
        total += tl.sum(out * gt.to(tl.float32), 0)
        rest = tl.maximum(tokens - 1 - row, 0)
        to_end = tl.exp2(rate * rest)
        whole, rest_of_one = whole_and_rest(rate * tokens * 0.6931471805599453)
        drift += state * tokens
        drifting = (vt.to(tl.float32) * (to_end * rest)[None, :]).to(vt.dtype)
        drift = tl.dot(drifting, kt, drift * whole + drift * rest_of_one, input_precision=PRECISION)
        weighted = (vt.to(tl.float32) * to_end[None, :]).to(vt.dtype)
        state = tl.dot(weighted, kt, state * whole + state * rest_of_one, input_precision=PRECISION)
    result = scale * tl.sum(total, 0)
    # What the segment does to the state after it, weighed with that state's gradient.
    ahead = first_state(
        zero, Begin(dfinal, of_sequence, is_whole, grads_after, of_segment, is_whole), d, e, shape, False
    )
    result += tl.sum(tl.sum(drift * ahead, 1), 0)
    tl.store(partial + pid, result)
