"""The tokens that a pool's states have yet to take up."""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Tokens, at most, that a ring holds.
LONGEST = 64


@dataclass(frozen=True, eq=False)
class RecentTokens:
    """A ring of the last tokens' keys and values for each row of a pool, so that steps need not write the states.

    Given as ``recent`` to the serving operations. A step reads the state and appends its token to the ring; a head
    folds what it holds into its state once in R tokens, other heads in other steps, so that each step writes 1/R of
    the states. A sequence's state is its row of the pool and its row of k, v and count: copy all four, to any slot, or
    have ``lightning_attention_fold`` make the pool's row whole first.

    Attributes:
        k: [S, H, R, D], the keys; token i of a row since it was last whole is at place i mod R. Places that are not in
            use may hold anything.
        v: [S, H, R, E], the values, of k's dtype.
        count: [S] int32, the tokens appended since the row was last whole, less multiples of R from 2 R on; 0: the ring
            is empty, and the pool's row is the state.
    """

    k: Tensor
    v: Tensor
    count: Tensor

    @classmethod
    def empty(
        cls,
        slots: int,
        num_heads: int,
        D: int,
        E: int,
        length: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
    ) -> "RecentTokens":
        """Empty rings for a pool [slots, num_heads, D, E].

        Args:
            slots: S.
            num_heads: H, of v.
            D: width of q and k.
            E: width of v.
            length: R, from 1 to 64.
            dtype: that of the k and v that will come, or float32 for those of 16 bits: a ring holds them exactly.
            device: that of the pool.

        Raises:
            ValueError: ``length`` is not from 1 to 64.
        """
        if not 1 <= length <= LONGEST:
            raise ValueError(f"length is {length}; it must be from 1 to {LONGEST}")
        return cls(
            torch.zeros(slots, num_heads, length, D, dtype=dtype, device=device),
            torch.zeros(slots, num_heads, length, E, dtype=dtype, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )


def tensors(recent: RecentTokens | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the operators take them."""
    return (None, None, None) if recent is None else (recent.k, recent.v, recent.count)
