"""What a model has to offer in order to be served. It inherits from nothing here: having these members is enough."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class DecoderBlock(Protocol):
    """One block, and the memory that it keeps of every sequence.

    :meth:`step` and :meth:`prefill` run without gradients. They read nothing on the host and keep their state at the
    same address, so that a step can be captured in a CUDA graph. A negative slot is padding: it touches no state, and
    whatever is returned for it is ignored, as is what is returned for tokens past ``cu_seqlens[-1]``.

    A block may also have ``allocate_recent(rows, length)``, which gives rings of so many recent tokens (a
    :class:`~lightning_attention.RecentTokens`, or anything) beside its state, or None for none. Both methods then get
    them as ``recent``, where the engine uses rings.
    """

    def allocate_state(self, rows: int, dtype: torch.dtype) -> Any:
        """The memory of that many sequences, in whatever form the block likes; recurrent states in ``dtype``."""

    def step(self, x: Tensor, state: Any, *, positions: Tensor, slots: Tensor) -> Tensor:
        """Read one token of each sequence: x [N, width], positions and slots [N] int64. Returns [N, width]."""

    def prefill(
        self, x: Tensor, state: Any, *, cu_seqlens: Tensor, positions: Tensor, slots: Tensor, fresh: Tensor
    ) -> Tensor:
        """Read the next tokens of N sequences, packed: x [T, width], cu_seqlens [N+1], positions [T], slots [N] int64.

        ``fresh`` [N] bool is true where a sequence starts, whatever its row holds. Returns [T, width].
        """


class DecoderModel(Protocol):
    """A decoder: token ids are embedded, pass the blocks one after another, and become logits.

    Attributes:
        vocab_size: number of tokens.
        context_length: tokens that a sequence may have in all, prompt included; None where there is no limit.
    """

    vocab_size: int
    context_length: int | None

    @property
    def embed(self) -> Callable[[Tensor], Tensor]:
        """[T] int64 token ids to [T, width]."""

    @property
    def blocks(self) -> Iterable[DecoderBlock]:
        """The blocks, first to last."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """What the last block gave, [N, width], to logits [N, vocab_size], the last norm included."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """As of nn.Module: the first one that is floating says on which device and in which dtype the model is."""

    def eval(self) -> Any:
        """As of nn.Module."""
