"""One primitive, four uses: o_t = Σ_{s≤t} λ^(t−s) (a_t·b_s) c_s, or the same with time reversed, block by block.

``attention`` is sweep(q, k, v); its gradients are dq = sweep(do, v, k), dk = rsweep(v, do, q), dv = rsweep(k, q, do).
The blocks of a piece are worked on at once, in buffers [n, B, H, C, ·] that all pieces share, and a loop carries the
state over them. A product with a triangle of decays would multiply what follows by zero, and 0 · inf is NaN: one
request's overflow would reach the rest of its batch.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from lightning_attention.kernels.tiled.blocks import Blocks, Piece
from lightning_attention.kernels.tiled.decays import Crossing, Decay

_LINE = 64  # bytes


class Run:
    """What all sweeps of a call over the same heads and sequences share."""

    def __init__(self, blocks: Blocks, decay: Decay, pieces: Sequence[Piece], invariant: bool) -> None:
        self.blocks, self.decay, self.pieces = blocks, decay, pieces
        #: Whether the order of a sequence's sums must not depend on where the edges of pieces are.
        self.invariant = invariant
        self._whole: dict[int, Crossing] = {}

    def crossing(self, piece: Piece) -> Crossing:
        """The decays over the piece's blocks; those of whole blocks are kept, since other pieces have the same."""
        if not piece.whole:
            return Crossing(self.decay, piece.length)
        if piece.size not in self._whole:
            self._whole[piece.size] = Crossing(self.decay, piece.length)
        return self._whole[piece.size]


class Buffers:
    """Tensors cut from one, one after the other."""

    def __init__(self, space: Tensor) -> None:
        self.space, self.used = space, 0

    def take(self, *shape: int) -> Tensor:
        count = prod(shape)
        start = self.used
        self.used += _whole_lines(count, self.space.itemsize)
        return self.space[start : start + count].view(shape)


def _whole_lines(count: int, itemsize: int) -> int:
    line = _LINE // itemsize
    return -(-count // line) * line


def space_for(n: int, units: int, block: int, Y: int, Z: int, *, drift: bool) -> int:
    """How many numbers a sweep over n blocks and so many heads needs to work in: a and b have Y channels, c has Z."""
    rows, states = n * units * block, (n + 1) * units * Y * Z
    sizes = [states, rows * max(Y, Z), rows * Z, rows * Y, rows * block]
    if drift:
        sizes += [states, rows * Z, rows * max(Z, block)]
    return sum(size + _LINE for size in sizes)


class Work:
    """The buffers [n, B, H, ·, ·] of a piece, made once for all pieces of n blocks, and the matrices in them."""

    def __init__(self, space: Tensor, n: int, B: int, H: int, C: int, Y: int, Z: int, *, reverse: bool) -> None:
        self.buffers = buffers = Buffers(space)
        self.slots = buffers.take(n + 1, B, H, Y, Z)
        self.states = self.slots.unbind(0)
        room = buffers.take(n * B * H * C * max(Y, Z))
        self.b = room[: n * B * H * C * Y].view(n, B, H, C, Y)
        self.y = room[: n * B * H * C * Z].view(n, B, H, C, Z)  # in the place of b, when it has done its part
        self.c = buffers.take(n, B, H, C, Z)
        self.a = buffers.take(n, B, H, C, Y)
        self.scores = buffers.take(n, B, H, C, C)
        self.before, self.own = (
            matrices(x) for x in ((self.slots[1:], self.slots[:-1]) if reverse else (self.slots[:-1], self.slots[1:]))
        )
        self.entry = self.states[n if reverse else 0]
        self.exit = self.states[0 if reverse else n]
        self.as_, self.bs, self.cs, self.ys = (matrices(x) for x in (self.a, self.b, self.c, self.y))
        self.b_t, self.all_scores = self.bs.mT, matrices(self.scores)


def matrices(x: Tensor) -> Tensor:
    """[n, B, H, ·, ·] -> [n · B · H, ·, ·]"""
    return x.flatten(0, 2)


def sweep(
    run: Run,
    space: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    out: Tensor | None,
    *,
    reverse: bool = False,
    given: Tensor | None = None,
    leave: Tensor | None = None,
    drift: "Drift | None" = None,
) -> None:
    """Write out [B, T, H, Z], times scale, of a and b [B, T, H, Y] and c [B, T, H, Z], and the states that are left.

    Args:
        run: decays, pieces and blocks.
        space: at least ``space_for`` numbers of the accumulator's type, to work in.
        a: [B, T, H, Y]; None, as out, for the states alone.
        b: [B, T, H, Y].
        c: [B, T, H, Z].
        out: [B, T, H, Z].
        given: [N, H, Y, Z], the state before each sequence (reversed: after it); None for zero.
        leave: [N, H, Y, Z], gets the state after each sequence (before it) that has tokens.
        reverse: time reversed.
        drift: gathers the gradient of log_decay in the sweep for dq.
    """
    blocks, decay, carry = run.blocks, run.decay, None
    B, H, Y, Z, C = b.shape[0], b.shape[2], b.shape[3], c.shape[3], decay.block
    mask = decay.mask.mT if reverse else decay.mask
    b_views, c_views = blocks.views(b), blocks.views(c)
    a_views, out_views = (None if x is None else blocks.views(x) for x in (a, out))
    works: dict[int, Work] = {}
    for piece in reversed(run.pieces) if reverse else run.pieces:
        n, crossing = piece.size, run.crossing(piece)
        if n not in works:
            works[n] = Work(space, n, B, H, C, Y, Z, reverse=reverse)
        work = works[n]
        if carry is None:
            work.slots.zero_()
        else:
            work.entry.copy_(carry)
        blocks.load(b_views, piece, work.b)
        blocks.load(c_views, piece, work.c)
        if a_views is not None:
            blocks.load(a_views, piece, work.a)
            torch.bmm(work.as_, work.b_t, out=work.all_scores)
            work.scores.mul_(mask)
        work.b.mul_(decay.start if reverse else crossing.end)
        torch.bmm(work.b_t, work.cs, out=work.own)
        _carry_over(work, run, piece, crossing, given, leave, reverse=reverse)
        if out_views is not None:
            work.a.mul_(crossing.end if reverse else decay.start)
            if drift is not None:
                drift.add(run, work, piece, crossing)
            torch.bmm(work.all_scores, work.cs, out=work.ys)
            work.ys.baddbmm_(work.as_, work.before)
            blocks.store(out_views, work.y, piece)
        carry = work.exit


def _carry_over(
    work: Work,
    run: Run,
    piece: Piece,
    crossing: Crossing,
    given: Tensor | None,
    leave: Tensor | None,
    *,
    reverse: bool,
) -> None:
    """From what enters the piece and each block's own k ᵀ v to the states between blocks, in the slots.

    Slot i is the state before block i, and the own of block i comes in slot i + 1; reversed, in slot i, and slot i + 1
    is what is after block i.
    """
    n, states, blocks = piece.size, work.states, run.blocks
    begins, ends = (piece.last, piece.first) if reverse else (piece.first, piece.last)
    order = range(n - 1, -1, -1) if reverse else range(n)
    to, away = (1, 0) if reverse else (0, 1)

    # What enters is added to the blocks of its sequence at once, and carried out of the piece by one factor: its
    # roundings are one a piece.
    entered = 0
    if not run.invariant:
        while entered < n and begins[order[entered]] is False:
            entered += 1
    if entered:
        across = crossing.across
        for i in order[1:entered]:
            states[i + away].addcmul_(across[i], states[i + to])
        whole, keep, rest = crossing.entering_backwards if reverse else crossing.entering
        last = order[entered - 1]
        if entered > 1:
            inner = slice(last + 1, n) if reverse else slice(0, last)
            work.slots[inner.start + away : inner.stop + away].addcmul_(whole[inner], work.entry)
        states[last + away].addcmul_(rest[last], work.entry).addcmul_(keep[last], work.entry)
        if leave is not None:
            blocks.leave(leave, states[last + away], piece, last, ends)
    keep, rest = crossing.keep, crossing.rest
    for i in order[entered:]:
        before, after = states[i + to], states[i + away]
        blocks.begin(before, given, piece, i, begins)
        after.addcmul_(rest[i], before).addcmul_(keep[i], before)
        if leave is not None:
            blocks.leave(leave, after, piece, i, ends)


class Drift:
    """The gradient of log_decay, gathered in the sweep for dq, whose a, b and c are do, v and k.

    The distance t − s of a pair is taken apart where a block ends. Within a block it weighs q kᵀ and do vᵀ. Between
    blocks R = ∂S/∂(log λ) is carried with the state S, R ← λ^m (R + m S) + Σ_r (m−r) λ^(m−r) k_rᵀ v_r.
    """

    def __init__(self, q: Tensor, dfinal: Tensor | None, total: Tensor) -> None:
        """For q [B, T, H, D], dfinal [N, H, E, D], of the final state's transpose; total [H], to which is added."""
        self.q, self.dfinal, self.total = q, dfinal, total
        self.carry: Tensor | None = None

    def add(self, run: Run, work: Work, piece: Piece, crossing: Crossing) -> None:
        """A piece's share, with a, b and scores as they are weighted, and the states between blocks, transposed."""
        buffers, blocks = Buffers(work.buffers.space), run.blocks
        buffers.used = work.buffers.used
        drifts, q = buffers.take(*work.slots.shape), buffers.take(*work.c.shape)
        blocks.load(blocks.views(self.q), piece, q)
        if self.carry is None:
            drifts.zero_()
        else:
            drifts[0].copy_(self.carry)
        room = buffers.take(max(q.numel(), work.scores.numel()))
        pairs, weighed = room[: work.scores.numel()].view(work.scores.shape), room[: q.numel()].view(q.shape)

        torch.bmm(matrices(q), work.cs.mT, out=matrices(pairs))
        self.total += pairs.mul_(work.scores).mul_(run.decay.distance).sum((0, 1, 3, 4))

        work.b.mul_(crossing.left)
        torch.bmm(work.b_t, work.cs, out=matrices(drifts[1:]))
        for i, (before, after) in enumerate(pairwise(drifts.unbind(0))):
            blocks.begin(before, None, piece, i, piece.first)
            after.addcmul_(crossing.slope[i], work.states[i])
            after.addcmul_(crossing.rest[i], before).addcmul_(crossing.keep[i], before)
            if self.dfinal is not None:
                self.total += blocks.weighed(self.dfinal, after, piece, i)
        self.carry = drifts[-1].clone()

        torch.bmm(work.as_, work.before, out=matrices(weighed))
        weighed.mul_(run.decay.rows[:, None])
        matrices(weighed).baddbmm_(work.as_, matrices(drifts[:-1]))
        self.total += weighed.mul_(q).sum((0, 1, 3, 4))
