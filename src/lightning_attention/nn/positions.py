"""Where tokens stand in their sequences, also where a rank has a slice of them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_positions(x: Tensor, *, cu_seqlens: Tensor | None = None, group: "ProcessGroup | None" = None) -> Tensor:
    """How many tokens of its sequence stand before each token: the positions for rope and LRPE, for all layers at once.

    Args:
        x: [B, T] or [B, T, ...], the tokens; only its sizes and its device matter.
        cu_seqlens: as ``lightning_attention`` takes it, with ``group`` too: [N+1] integers on x's device, this rank's
            slices of N packed sequences, and B is 1. None: every row is a sequence.
        group: process group whose ranks, in order, hold consecutive slices of each sequence, x being this rank's; T may
            differ. Every rank must call; a number per sequence travels, and nothing waits for the device.

    Returns:
        [T] int64.

    Raises:
        TypeError: ``group`` is not a process group.
    """
    index = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return index if group is None else index + tokens_before(index.new_full((1,), x.shape[1]), group)
    own = torch.searchsorted(cu_seqlens.contiguous(), index.to(cu_seqlens.dtype), right=True) - 1
    positions = index - cu_seqlens[own]
    if group is not None:
        # One more, of none, for the padding after the last sequence.
        positions += torch.nn.functional.pad(tokens_before(cu_seqlens.diff().long(), group), (0, 1))[own]
    return positions


def tokens_before(lengths: Tensor, group: "ProcessGroup") -> Tensor:
    """How many tokens of each sequence the earlier ranks have: lengths [N] int64, this rank's, to [N]."""
    # Here, since it takes its time, and most layers never need it.
    from lightning_attention.distributed.sequence_parallel import check_group, gathered

    check_group(group)
    return gathered(lengths, group)[: group.rank()].sum(0)
