"""Lightning Attention-2 (arXiv 2401.04658, Algorithms 1 and 2) with every block of a piece computed at once.

A piece is a run of blocks: inside it the products of all blocks are one batched matrix product each, and a Python loop
carries the state from block to block. The pieces keep the working set in cache: on two CPU cores at H = 8, D = 64 a
sequence worked on as one piece took twice as long per token at T = 65536 as at T = 4096.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attention.kernels.tiled.layout import Layout, Piece, layout_of

BLOCK = 64  # C
PIECE = 32  # blocks, at most
WORKING_SET = 2**21  # numbers in a piece of one of its intermediate results
LINE = 16  # numbers: 64 bytes of float32


class Decay:
    """Powers of each head's decay, as float32 (float64) exponentials of non-positive numbers."""

    def __init__(self, log_decay: Tensor | None, H: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rate = torch.zeros(H, dtype=dtype, device=device) if log_decay is None else log_decay.to(dtype)
        row = torch.arange(BLOCK, device=device)
        distance = row[:, None] - row
        self.rows = row + 1
        self.distance = distance.clamp(min=0)
        #: M [H, 1, C, C]
        self.mask = torch.where(distance >= 0, self.power(self.distance), 0).unsqueeze(1)

    def power(self, exponent: Tensor) -> Tensor:
        """λ^exponent, [H, *exponent.shape], for exponents ≥ 0."""
        return (self.rate.view(-1, *(1,) * exponent.ndim) * exponent).exp()

    def from_start(self) -> Tensor:
        """Λ [H, 1, C, 1]: a block's start to each row, λ^1 … λ^C."""
        return self.power(self.rows)[:, None, :, None]

    def to_end(self, piece: Piece) -> Tensor:
        """Γ [H, n, C, 1]: each row to the end of its block, λ^(m−1) … λ^0 for m tokens; rows past it get 1."""
        return self.power((piece.length[:, None] - self.rows).clamp(min=0)).unsqueeze(-1)

    def across(self, piece: Piece) -> Tensor:
        """λ^m [H, n, 1, 1]: a whole block."""
        return self.power(piece.length)[..., None, None]


def _pass_on(
    own: Tensor, carry: Tensor | None, given: Tensor | None, edge: Tensor, across: Tensor, *, backward: bool = False
) -> Tensor:
    """Carry a state over blocks of m tokens: after = own + λ^m before, where before is the block before's after.

    Args:
        own: [B, H, n, D, E]; becomes after, in place.
        carry: [B, H, D, E], what comes into the piece; None for zero.
        given: [B, H, n or 1, D, E], before of the blocks at an edge; None for zero.
        edge: [n], whether a block is its sequence's first (backward: last).
        across: [H, n, 1, 1], λ^m.
        backward: from the last block to the first.

    Returns before. A product with a triangle of decays would multiply other sequences by zero, and 0 · inf is NaN: one
    request's overflow would reach the rest of its batch. With one thread of a CPU the product took 0.97 to 1.3 times
    as long, too. The order of the sums, and so the bits, do not depend on what else is in the piece.
    """
    before, zero = torch.empty_like(own), own.new_zeros(())
    given = (zero if given is None else given).expand_as(own)
    edges = _unbound(edge)
    blocks = list(zip(own.unbind(2), before.unbind(2), given.unbind(2), across.unbind(1), edges, strict=True))
    after = zero if carry is None else carry
    for own_i, before_i, given_i, across_i, edge_i in reversed(blocks) if backward else blocks:
        if isinstance(edge_i, bool):
            before_i.copy_(given_i if edge_i else after)
        else:
            before_i.copy_(torch.where(edge_i, given_i, after))
        after = own_i.addcmul_(across_i, before_i)
    return before


def _unbound(edge: Tensor) -> Sequence[bool | Tensor]:
    """One entry for each block: numbers on a CPU, where reading them costs nothing, else tensors on their device."""
    return edge.tolist() if edge.device.type == "cpu" else edge.unbind()


def _states(
    own: Tensor, carry: Tensor | None, initial: Tensor | None, decay: Decay, layout: Layout, piece: Piece
) -> Tensor:
    """States [B, H, n, D, E] at the start of each block from each block's own k ᵀ v, which becomes those at the end."""
    given = None if initial is None else layout.states(initial, piece)
    return _pass_on(own, carry, given, piece.index == 0, decay.across(piece))


def _state_gradients(
    own: Tensor, carry: Tensor | None, dfinal: Tensor | None, decay: Decay, layout: Layout, piece: Piece
) -> Tensor:
    """Their gradients at the end of each block from each block's own (Λ q)ᵀ do, which becomes those at the start."""
    given = None if dfinal is None else layout.states(dfinal, piece)
    return _pass_on(own, carry, given, piece.last, decay.across(piece), backward=True)


def _pieces(layout: Layout, H: int, D: int, E: int) -> list[Piece]:
    size = PIECE
    if layout.device.type == "cpu":
        # A wide batch in shorter pieces, for the cache: forward and backward at B = 2, H = 16, D = 128 take 14 µs per
        # token and head on one core, not 23; at B = 4, H = 16, D = 64 they take 5, not 8.
        size = min(size, max(1, WORKING_SET // max(1, layout.B * H * max(BLOCK, D) * max(BLOCK, E))))
    return [layout.piece(i, min(i + size, layout.num_blocks)) for i in range(0, layout.num_blocks, size)]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_Padded = TypeVar("_Padded", Tensor, Tensor | None)


def _whole_lines(x: _Padded, dims: int = 1) -> _Padded:
    """Pad the last sizes, D or E or both, to whole cache lines.

    The bits of a matrix product depend on how its operands are aligned and shared among threads, and an odd D×E state
    is aligned by its place in the batch: with MKL a tenth of the odd sizes gave other bits in another batch.
    """
    if x is None:
        return x
    return F.pad(x, [n for size in x.shape[: -dims - 1 : -1] for n in (0, -size % LINE)])


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
    """Outputs [B, T, H, E] and final states [N, H, D, E]; q None computes the states alone, with empty outputs."""
    dtype = _accumulator(v.dtype)
    H, D, E = k.shape[2], k.shape[3], v.shape[3]
    if batch_invariant and (D % LINE or E % LINE):
        q, k, v, initial_state = _whole_lines(q), _whole_lines(k), _whole_lines(v), _whole_lines(initial_state, 2)
        out, final = attention(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, True)
        return out[..., :E].contiguous(), None if final is None else final[..., :D, :E].contiguous()
    layout = layout_of(k, cu_seqlens, BLOCK)
    decay = Decay(log_decay, H, dtype, k.device)
    out = v.new_empty(0) if q is None else layout.empty(v)
    final = None
    if output_final_state:
        final = v.new_zeros(layout.N + 1, H, D, E, dtype=dtype)  # the last row takes what belongs to no sequence
        if initial_state is not None:
            final[:-1] = initial_state  # what an empty sequence ends with
    carry = None
    for piece in _pieces(layout, H, D, E):
        kb, vb = (layout.load(x, piece, dtype) for x in (k, v))
        ends = (kb * decay.to_end(piece)).mT @ vb
        states = _states(ends, carry, initial_state, decay, layout, piece)
        if q is not None:
            qb = layout.load(q, piece, dtype)
            y = (qb @ kb.mT).mul_(scale * decay.mask) @ vb
            y += qb.mul_(scale * decay.from_start()) @ states
            layout.store(out, y, piece)
        if final is not None:
            layout.put_last(final, ends, piece)
        carry = ends[:, :, -1]
    return out, None if final is None else final[:-1]


def _carries(
    k: Tensor, v: Tensor, initial: Tensor | None, decay: Decay, layout: Layout, pieces: list[Piece]
) -> list[Tensor | None]:
    """The state that enters each piece: computed again in the backward pass, never saved."""
    carries: list[Tensor | None] = [None]
    for piece in pieces[:-1]:
        kb, vb = (layout.load(x, piece, decay.rate.dtype) for x in (k, v))
        ends = (kb * decay.to_end(piece)).mT @ vb
        _states(ends, carries[-1], initial, decay, layout, piece)
        carries.append(ends[:, :, -1].clone())
    return carries


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
    dtype = _accumulator(v.dtype)
    H, D, E = k.shape[2], k.shape[3], v.shape[3]
    if batch_invariant and (D % LINE or E % LINE):
        q, k, v, dout = (_whole_lines(x) for x in (q, k, v, dout))
        dfinal, initial_state = _whole_lines(dfinal, 2), _whole_lines(initial_state, 2)
        dq, dk, dv, dlog, dinitial = attention_backward(
            dout, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, True, need_dlog_decay
        )
        dinitial = None if dinitial is None else dinitial[..., :D, :E].contiguous()
        return dq[..., :D].contiguous(), dk[..., :D].contiguous(), dv[..., :E].contiguous(), dlog, dinitial
    layout = layout_of(k, cu_seqlens, BLOCK)
    decay = Decay(log_decay, H, dtype, k.device)
    dq, dk, dv = layout.empty(q), layout.empty(k), layout.empty(v)
    dinitial = None
    if initial_state is not None:
        dinitial = v.new_zeros(layout.N + 1, H, D, E, dtype=dtype)
        if dfinal is not None:
            dinitial[:-1] = dfinal  # what an empty sequence passes on
    dlog = torch.zeros(H, dtype=dtype, device=k.device) if need_dlog_decay else None
    pieces = _pieces(layout, H, D, E)
    carries = _carries(k, v, initial_state, decay, layout, pieces)
    mask, start, dcarry = scale * decay.mask, scale * decay.from_start(), None

    for piece in reversed(pieces):
        qb, kb, vb, gb = (layout.load(x, piece, dtype) for x in (q, k, v, dout))
        end = decay.to_end(piece)
        states = _states((kb * end).mT @ vb, carries.pop(), initial_state, decay, layout, piece)
        dstarts = (qb * start).mT @ gb
        dends = _state_gradients(dstarts, dcarry, dfinal, decay, layout, piece)

        p, dp = qb @ kb.mT, (gb @ vb.mT).mul_(mask)
        dq_inter, dk_inter = (gb @ states.mT).mul_(start), (vb @ dends.mT).mul_(end)
        if dlog is not None:
            dlog += (p * dp * decay.distance).sum((0, 2, 3, 4))
            dlog += ((qb * dq_inter).sum(-1) * decay.rows).sum((0, 2, 3))
            dlog += ((kb * dk_inter).sum(-1) * (piece.length[:, None] - decay.rows)).sum((0, 2, 3))
            dlog += ((states * dends).sum((3, 4)) * (decay.across(piece)[..., 0, 0] * piece.length)).sum((0, 2))
        layout.store(dq, dq_inter.add_(dp @ kb), piece)
        layout.store(dk, dk_inter.add_(dp.mT @ qb), piece)
        layout.store(dv, (kb.mul_(end) @ dends).add_(p.mul_(mask).mT @ gb), piece)

        dcarry = dstarts[:, :, 0]
        if dinitial is not None:
            layout.put_first(dinitial, dstarts, piece)
    return dq, dk, dv, dlog, None if dinitial is None else dinitial[:-1]
