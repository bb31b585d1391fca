"""A batch over a pool of states, and a call that decodes, prefills or checks drafts with it.

What can be prepared once for all layers of a model (metadata, slopes, other layouts of the inputs) a peer prepares when
it is given the batch, outside the call that is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

DECODE, PREFILL, SPECULATE = "decode", "prefill", "verify + commit"
EAGER = "prefill, eager"  # a prefill as it is called where no CUDA graph is captured


@dataclass(frozen=True)
class Batch:
    """N packed sequences and the pool that has their states.

    q, k, v [T, H, D]; log_decay [H]; pool [N, H, D, D]; slots [N] int32; cu_seqlens [N+1] int32. ``fresh``: all
    sequences start from zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    pool: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    fresh: bool

    @property
    def N(self) -> int:
        return self.slots.shape[0]

    def initial(self) -> Tensor | None:
        """The states that the sequences start from, in their order, or None where that is zero."""
        return None if self.fresh else self.pool[self.slots.long()]


#: From the right output of some heads, [T, heads, D], and the numbers of these: what a call gives in its place.
Known = Callable[[Tensor, list[int]], Tensor]


class Bound(NamedTuple):
    """A call on tensors of its own, and the states after the last one.

    The call gives the T·H·D numbers of the output in any shape of that order, or [N, H, D] for each step.
    ``states`` gives [N, H, D, D] in the order of the sequences, or None for a call whose numbers are not checked.
    ``known``: for a call that is known to give another output than the right one.
    """

    call: Callable[[], Tensor | list[Tensor]]
    states: Callable[[], Tensor | None]
    known: Known | None = None


def pooled(batch: Batch, run: Callable[[Tensor], Tensor | list[Tensor]]) -> Bound:
    """A call that updates a pool in place."""
    pool, slots = batch.pool.clone(), batch.slots.long()
    return Bound(lambda: run(pool), lambda: pool[slots])
