"""How a sequence, or a packed batch of them, is cut into blocks of C tokens.

Blocks of one call form one row. In a dense batch all B sequences are cut alike and share the row; in a packed batch the
row holds the blocks of the first sequence, then those of the second, and so on, each sequence starting a block of its
own. Where the boundaries are is read on a CPU, where it costs nothing; on other devices the row has as many blocks as
there can be, those left over are empty, and what depends on the boundaries is chosen by tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Flags = Sequence[bool | Tensor]
Views = tuple[Tensor, ...]  # of an argument or a result, as blocks are read from it and written to it


@dataclass(frozen=True)
class Piece:
    """A run of n consecutive blocks, worked on at once.

    length [n]: tokens in each block. first, last: whether the block is its sequence's first, last. sequence: which it
    belongs to. token, valid [n · C], of a packed batch: the token each row stands for, and whether it stands for one;
    valid is None where all do.
    """

    start: int
    stop: int
    length: Tensor
    first: Flags
    last: Flags
    sequence: Sequence[int | Tensor]
    token: Tensor
    valid: Tensor | None = None
    #: Whether every block is known to have C tokens.
    whole: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start


class DenseBlocks:
    """[B, T, H, *]: every sequence of the batch has T tokens, and all their states are one block's."""

    def __init__(self, x: Tensor, block: int) -> None:
        self.B, self.T = x.shape[:2]
        self.N = self.B
        self.block = block
        self.num_blocks = -(-self.T // block)
        self.device = x.device

    def piece(self, start: int, stop: int) -> Piece:
        index = range(start, stop)
        length = [min(self.block, self.T - i * self.block) for i in index]
        first, last = [i == 0 for i in index], [i == self.num_blocks - 1 for i in index]
        lengths, whole = torch.tensor(length, device=self.device), stop * self.block <= self.T
        return Piece(start, stop, lengths, first, last, [0] * len(index), lengths, whole=whole)

    def views(self, x: Tensor) -> Views:
        """Views of [B, T, H, X]: the whole blocks [n, B, H, C, X], and what is left [B, H, m, X]."""
        whole = self.T // self.block
        middle = whole * self.block
        return x[:, :middle].unflatten(1, (whole, self.block)).permute(1, 0, 3, 2, 4), x[:, middle:].transpose(1, 2)

    def load(self, views: Views, piece: Piece, out: Tensor) -> Tensor:
        """Copy the piece's rows to out [n, B, H, C, X], zero past the end."""
        whole, rest = views
        if piece.whole:
            return out.copy_(whole[piece.start : piece.stop])
        out[:-1].copy_(whole[piece.start :])
        out[-1, :, :, : rest.shape[2]].copy_(rest)
        out[-1, :, :, rest.shape[2] :].zero_()
        return out

    def store(self, views: Views, y: Tensor, piece: Piece) -> None:
        """Write y [n, B, H, C, X] to the piece's rows."""
        whole, rest = views
        if piece.whole:
            whole[piece.start : piece.stop].copy_(y)
        else:
            whole[piece.start :].copy_(y[:-1])
            rest.copy_(y[-1, :, :, : rest.shape[2]])

    def begin(self, state: Tensor, given: Tensor | None, piece: Piece, i: int, begins: Flags) -> None:  # noqa: ARG002
        """Set the state [B, H, D, E] at block i to that given [N, H, D, E], or zero, where its sequence begins."""
        if begins[i]:
            _ = state.zero_() if given is None else state.copy_(given)

    def leave(self, left: Tensor, state: Tensor, piece: Piece, i: int, ends: Flags) -> None:  # noqa: ARG002
        """Write the state to those of the sequences [N, H, D, E] where the block's ends."""
        if ends[i]:
            left.copy_(state)

    def weighed(self, weights: Tensor, state: Tensor, piece: Piece, i: int) -> Tensor | int:
        """[H]: the products of the states that are left after the block with their weights [N, H, D, E], summed."""
        return (weights * state).sum((0, 2, 3)) if piece.last[i] else 0


class PackedBlocks:
    """[1, T, H, *] holding N sequences, sequence i at tokens cu_seqlens[i] to cu_seqlens[i+1]."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor, block: int) -> None:
        self.T, self.N = x.shape[1], cu_seqlens.numel() - 1
        self.B, self.block = 1, block
        self.cu_seqlens = cu_seqlens.long()
        self.lengths = self.cu_seqlens.diff()
        self.counts = -(-self.lengths // block)
        self.ends = self.counts.cumsum(0)
        self.device = x.device
        if is_read(self.device):
            self.num_blocks = int(self.ends[-1])
        else:
            # A sequence of L tokens takes at most (L + C − 1) / C blocks, and no more than L.
            self.num_blocks = min(self.T, (self.T + self.N * (block - 1)) // block)

    def piece(self, start: int, stop: int) -> Piece:
        block = torch.arange(start, stop, device=self.device)
        sequence = torch.searchsorted(self.ends, block, right=True)
        own = sequence.clamp(max=self.N - 1)
        index = block - (self.ends - self.counts)[own]
        length = (self.lengths[own] - index * self.block).clamp(0, self.block)
        length = torch.where(sequence < self.N, length, 0)
        row = torch.arange(self.block, device=self.device)
        token = (self.cu_seqlens[own] + index * self.block)[:, None] + row
        valid = (row < length[:, None]).flatten()
        flags = index == 0, block == self.ends[own] - 1
        token = token.flatten().clamp(0, max(self.T - 1, 0))
        if is_read(self.device):
            whole = bool(valid.all())
            (first, last), known = (x.tolist() for x in flags), None if whole else valid
            return Piece(start, stop, length, first, last, own.tolist(), token, known, whole)
        begins, ends = (x.unbind() for x in flags)
        return Piece(start, stop, length, begins, ends, own[:, None].unbind(), token, valid)

    def views(self, x: Tensor) -> Views:
        return (x[0],)

    def load(self, views: Views, piece: Piece, out: Tensor) -> Tensor:
        rows = views[0].index_select(0, piece.token).unflatten(0, (piece.size, self.block))
        out[:, 0].copy_(rows.transpose(1, 2))
        if piece.valid is not None:
            # Masked, not multiplied: the tokens past the last sequence may hold anything, and 0 · inf is NaN.
            out.masked_fill_(~piece.valid.view(piece.size, 1, 1, self.block, 1), 0)
        return out

    def store(self, views: Views, y: Tensor, piece: Piece) -> None:
        (out,) = views
        rows, token = y[:, 0].transpose(1, 2).flatten(0, 1).to(out.dtype), piece.token
        if piece.valid is not None:
            # A row that stands for no token repeats the write of one that does, the same bits to the same place. Where
            # none does, token 0 is written back as it is.
            some, one = piece.valid.any(), piece.valid.int().argmax()
            source = torch.where(piece.valid, torch.arange(rows.shape[0], device=rows.device), one)
            rows = torch.where(some, rows.index_select(0, source), out[:1])
            token = torch.where(some, token[source], 0)
        out.index_copy_(0, token, rows)

    def begin(self, state: Tensor, given: Tensor | None, piece: Piece, i: int, begins: Flags) -> None:
        begin, own = begins[i], piece.sequence[i]
        if isinstance(begin, bool):
            if begin:
                _ = state.zero_() if given is None else state.copy_(_of(given, own))
        else:
            state.copy_(torch.where(begin, 0 if given is None else _of(given, own), state))

    def leave(self, left: Tensor, state: Tensor, piece: Piece, i: int, ends: Flags) -> None:
        end, own = ends[i], piece.sequence[i]
        if isinstance(end, bool):
            if end:
                left[own].copy_(state[0])
        elif isinstance(own, Tensor):
            left.index_copy_(0, own, torch.where(end, state, _of(left, own)))

    def weighed(self, weights: Tensor, state: Tensor, piece: Piece, i: int) -> Tensor | int:
        end, own = piece.last[i], piece.sequence[i]
        if isinstance(end, bool):
            return (weights[own] * state[0]).sum((1, 2)) if end else 0
        return torch.where(end, _of(weights, own) * state, 0).sum((0, 2, 3))


def _of(states: Tensor, sequence: int | Tensor) -> Tensor:
    """[N, H, D, E] -> [1, H, D, E]"""
    return states[sequence : sequence + 1] if isinstance(sequence, int) else states.index_select(0, sequence)


def is_read(device: torch.device) -> bool:
    """Whether the host may look at the numbers of a tensor: on a CPU it costs nothing."""
    return device.type == "cpu"


Blocks = DenseBlocks | PackedBlocks


def blocks_of(x: Tensor, cu_seqlens: Tensor | None, block: int) -> Blocks:
    return DenseBlocks(x, block) if cu_seqlens is None else PackedBlocks(x, cu_seqlens, block)
