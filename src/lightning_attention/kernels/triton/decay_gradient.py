"""The gradient of log_decay, computed only where it is asked for.

Written as Σ_t t (q_t · dq_t − k_t · dk_t) it is a difference of sums that grow with the sequence, and useless in low
precision. Here the derivative of the state goes forward with the state: with R = ∂S/∂log λ, and i, r = 1..m in a block,

    ∂o_i = Σ_j (i−j) λ^(i−j) (q_i · k_j) v_j + λ^i q_i (R + i S)
    R ← λ^m (R + m S) + Σ_r (m−r) λ^(m−r) k_rᵀ v_r

every weight is positive, and the result is Σ_t do_t · ∂o_t plus the final state's ⟨dS, R⟩. A segment starts from R = 0:
what it does to the state after it is weighed with that state's gradient, which the backward pass has.
"""

import triton
import triton.language as tl

from lightning_attention.kernels.triton.part import is_alone, log2_decay, segment, whole_and_rest
from lightning_attention.kernels.triton.sweep import first_state, load_rows


@triton.jit(do_not_specialize=["segments", "L", "T"])
def decay_gradient_kernel(q, k, v, g, q_batch: "i64", q_row, q_head: "i64", k_batch: "i64", k_row, k_head: "i64",
                          v_batch: "i64", v_row, v_head: "i64", g_batch: "i64", g_row, g_head: "i64", log_decay,
                          initial, dfinal, before, after, partial, table, segments, L, T, H, D, E, scale,
                          C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, EVEN_D: tl.constexpr,
                          EVEN_E: tl.constexpr, PACKED: tl.constexpr, SEGMENTED: tl.constexpr, INITIAL: tl.constexpr,
                          DFINAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """partial [slots, H, tiles]: each program's part of the sum.

    float16 inputs are multiplied in TF32, which has their bits and float32's range: R grows like T^1.5 where nothing
    decays, past 65504 from T = 1024 on, and with strong decays all of it is next to nothing.
    """
    DTYPE: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float16 else q.dtype.element_ty
    tiles = tl.cdiv(E, BE)
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % H
    place = pid // tiles // H
    sequence, batch, start, stop, is_first, is_last, slot = segment(table, place, segments, L, T, PACKED)
    if sequence < 0:
        tl.store(partial + pid, 0.0)
        return
    rate = log2_decay(log_decay, head)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    g += batch * g_batch + head * g_head
    of_sequence = (sequence.to(tl.int64) * H + head) * D * E
    of_segment = (slot.to(tl.int64) * H + head) * D * E
    alone = is_alone(is_first, is_last, SEGMENTED, PACKED)
    state = first_state(initial + of_sequence, alone, before + of_segment, alone, tile * BE, D, E, E, 1, BD, BE,
                        INITIAL, SEGMENTED)  # fmt: skip
    drift = tl.zeros([BE, BD], tl.float32)
    total = tl.zeros([C], tl.float32)
    row = tl.arange(0, C)
    gap = row[None, :] - row[:, None]
    mask = tl.where(gap >= 0, tl.exp2(rate * tl.maximum(gap, 0)) * gap, 0.0)
    from_start = tl.exp2(rate * (row + 1))
    for n in tl.range(0, tl.cdiv(stop - start, C), num_stages=STAGES):
        at = start + n * C
        tokens = tl.minimum(stop - at, C)
        qt = tl.trans(load_rows(q, q_row, at, stop, 0, D, C, BD, EVEN_D).to(DTYPE))
        kt = load_rows(k, k_row, at, stop, 0, D, C, BD, EVEN_D).to(DTYPE)
        vt = tl.trans(load_rows(v, v_row, at, stop, tile * BE, E, C, BE, EVEN_E).to(DTYPE))
        gt = tl.trans(load_rows(g, g_row, at, stop, tile * BE, E, C, BE, EVEN_E))
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
    ahead = first_state(dfinal + of_sequence, alone, after + of_segment, alone, tile * BE, D, E, E, 1, BD, BE,
                        DFINAL, SEGMENTED)  # fmt: skip
    result += tl.sum(tl.sum(drift * ahead, 1), 0)
    tl.store(partial + pid, result)
