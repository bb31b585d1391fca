"""The collective of sequence parallelism: every rank holds a slice of each sequence, and only states travel.

After LASP-2, arXiv 2502.07563; ``kernels/sequence_parallel.py`` has what is computed from them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, _resolve_process_group

_resolve: Callable[[str], dist.ProcessGroup] = _resolve_process_group  # type: ignore[assignment]

#: What all_gather_into_tensor, since torch 2.13 all_gather_single, calls after 20 µs of Python.
_all_gather = getattr(dist.ProcessGroup, "all_gather_single", None) or dist.ProcessGroup._allgather_base
_OPTIONS = {True: AllgatherOptions(), False: AllgatherOptions()}
for _is_async, _options in _OPTIONS.items():
    _options.asyncOp = _is_async


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group, in the order of their slices; by its name, because operators take no groups."""

    group_name: str
    rank: int
    size: int

    @classmethod
    def of(cls, group_name: str) -> "Ranks":
        """Those of the group that has this name now."""
        group = _resolve(group_name)
        return cls(group_name, group.rank(), group.size())

    def gather(self, message: Tensor, gathered: Tensor, *, meanwhile: bool = False) -> Callable[[], object]:
        """Start to write every rank's message, along the first dimension, to ``gathered``; wait with what is returned.

        On a GPU nothing waits on the host. Only if something is to be computed ``meanwhile`` the collective has a
        stream of its own: to go there and back takes longer than a launch.
        """
        work = _all_gather(_resolve(self.group_name), gathered, message, _OPTIONS[meanwhile])
        return _nothing if work is None else work.wait


def _nothing() -> None:
    """Where the current stream has the collective already."""
