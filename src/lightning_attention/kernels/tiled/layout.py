"""How a sequence, or a packed batch of them, is cut into blocks of C tokens, without reading a tensor on the host.

Blocks of one call form one row of n. In a dense batch all B sequences are cut alike and share the row; in a packed
batch the row holds the blocks of the first sequence, then those of the second, and so on, each sequence starting a
block of its own. The number of sequences' blocks is known only to the device, so the row has as many as there can
be, and those left over are empty.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of at most n consecutive blocks, worked on at once.

    length [n]: tokens in each block. index [n]: the block's place within its own sequence. sequence [n]: which
    sequence it belongs to (N for an empty block). last [n]: whether it is its sequence's last.
    """

    start: int
    stop: int
    length: Tensor
    index: Tensor
    sequence: Tensor
    last: Tensor

    @property
    def size(self) -> int:
        return self.stop - self.start


class DenseLayout:
    """[B, T, H, *]: every sequence of the batch has T tokens."""

    def __init__(self, x: Tensor, block: int) -> None:
        self.B, self.T = x.shape[:2]
        self.N = self.B
        self.block = block
        self.num_blocks = -(-self.T // block)
        self.device = x.device

    def piece(self, start: int, stop: int) -> Piece:
        index = torch.arange(start, stop, device=self.device)
        length = (self.T - index * self.block).clamp(max=self.block)
        return Piece(start, stop, length, index, torch.zeros_like(index), index == self.num_blocks - 1)

    def load(self, x: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
        """[B, T, H, X] -> [B, H, n, C, X] of the piece, contiguous, zero past the end."""
        B, T, H, X = x.shape
        out = x.new_empty(B, H, piece.size * self.block, X, dtype=dtype)
        first = piece.start * self.block
        tokens = min(T - first, piece.size * self.block)
        out[:, :, :tokens] = x[:, first : first + tokens].transpose(1, 2)
        out[:, :, tokens:] = 0
        return out.view(B, H, piece.size, self.block, X)

    def empty(self, like: Tensor) -> Tensor:
        return like.new_empty(like.shape)

    def store(self, out: Tensor, y: Tensor, piece: Piece) -> None:
        """Write [B, H, n, C, X] to the piece's tokens of [B, T, H, X]."""
        first = piece.start * self.block
        tokens = min(self.T - first, piece.size * self.block)
        out[:, first : first + tokens] = y.flatten(2, 3)[:, :, :tokens].transpose(1, 2)

    def states(self, state: Tensor, piece: Piece) -> Tensor:  # noqa: ARG002
        """[N, H, D, E] -> [B, H, 1, D, E]: the state of the sequence that each block belongs to."""
        return state.unsqueeze(2)

    def put_first(self, out: Tensor, states: Tensor, piece: Piece) -> None:
        """Write the states [B, H, n, D, E] of the blocks that begin a sequence to [N + 1, H, D, E]."""
        if piece.start == 0:
            out[:-1] = states[:, :, 0]

    def put_last(self, out: Tensor, states: Tensor, piece: Piece) -> None:
        """The same for the blocks that end a sequence."""
        if piece.stop == self.num_blocks:
            out[:-1] = states[:, :, -1]


class PackedLayout:
    """[1, T, H, *] holding N sequences, sequence i at tokens cu_seqlens[i] to cu_seqlens[i+1]."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor, block: int) -> None:
        self.T, self.N = x.shape[1], cu_seqlens.numel() - 1
        self.B, self.block = 1, block
        self.cu_seqlens = cu_seqlens.long()
        self.lengths = self.cu_seqlens.diff()
        # A sequence of L tokens takes at most (L + C − 1) / C blocks, and no more than L.
        self.num_blocks = min(self.T, (self.T + self.N * (block - 1)) // block)
        self.ends = (-(-self.lengths // block)).cumsum(0)
        self.device = x.device

    def piece(self, start: int, stop: int) -> Piece:
        block = torch.arange(start, stop, device=self.device)
        sequence = torch.searchsorted(self.ends, block, right=True)
        own = sequence.clamp(max=self.N - 1)
        starts = self.ends - (-(-self.lengths // self.block))
        index = block - starts[own]
        used = sequence < self.N
        length = torch.where(used, (self.lengths[own] - index * self.block).clamp(0, self.block), 0)
        return Piece(start, stop, length, index, sequence, block == self.ends[own] - 1)

    def _tokens(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """For each of the n·C rows, the token it stands for, and whether it stands for one."""
        row = torch.arange(self.block, device=self.device)
        own = piece.sequence.clamp(max=self.N - 1)
        token = self.cu_seqlens[own, None] + piece.index[:, None] * self.block + row
        return token.flatten(), (row < piece.length[:, None]).flatten()

    def load(self, x: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
        token, valid = self._tokens(piece)
        rows = x[0].index_select(0, token.clamp(0, self.T - 1)).transpose(0, 1).to(dtype)
        # Masked, not multiplied: the tokens past the last sequence may hold anything, and 0 · inf is NaN.
        rows = torch.where(valid[:, None], rows, 0)
        return rows.contiguous().view(1, x.shape[2], piece.size, self.block, x.shape[3])

    def empty(self, like: Tensor) -> Tensor:
        # One row more than there are tokens, for the rows of a block that stand for none.
        return like.new_zeros(1, self.T + 1, *like.shape[2:])[:, : self.T]

    def store(self, out: Tensor, y: Tensor, piece: Piece) -> None:
        token, valid = self._tokens(piece)
        padded = out.as_strided((self.T + 1, *out.shape[2:]), out.stride()[1:])
        padded.index_copy_(0, torch.where(valid, token, self.T), y[0].flatten(1, 2).transpose(0, 1).to(out.dtype))

    def states(self, state: Tensor, piece: Piece) -> Tensor:
        return state.index_select(0, piece.sequence.clamp(max=self.N - 1)).transpose(0, 1).unsqueeze(0)

    def put_first(self, out: Tensor, states: Tensor, piece: Piece) -> None:
        self._put(out, states, piece, piece.index == 0)

    def put_last(self, out: Tensor, states: Tensor, piece: Piece) -> None:
        self._put(out, states, piece, piece.last)

    def _put(self, out: Tensor, states: Tensor, piece: Piece, where: Tensor) -> None:
        out.index_copy_(0, torch.where(where, piece.sequence, self.N), states[0].transpose(0, 1))


Layout = DenseLayout | PackedLayout


def layout_of(x: Tensor, cu_seqlens: Tensor | None, block: int) -> Layout:
    return DenseLayout(x, block) if cu_seqlens is None else PackedLayout(x, cu_seqlens, block)
