"""The collectives of sequence parallelism: every rank holds a slice of each sequence, and only states travel.

After LASP-2, arXiv 2502.07563; ``kernels/sequence_parallel.py`` has what is computed from them. Beside the states,
layers and models exchange small facts (``gathered``, ``total``), softmax layers keys and values (``gather_tokens``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, _resolve_process_group

_resolve: Callable[[str], dist.ProcessGroup] = _resolve_process_group  # type: ignore[assignment]

#: What all_gather_into_tensor, since torch 2.13 all_gather_single, calls after 20 µs of Python.
_all_gather = getattr(dist.ProcessGroup, "all_gather_single", None) or dist.ProcessGroup._allgather_base
# Both under their names since torch 2.13, and before.
_all_gather_traced = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_all_gather_autograd = (
    getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
)
_OPTIONS = {True: AllgatherOptions(), False: AllgatherOptions()}
for _is_async, _options in _OPTIONS.items():
    _options.asyncOp = _is_async


def check_group(group: object) -> dist.ProcessGroup:
    """The group, if it is one. Raises TypeError otherwise."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; it must be a torch.distributed ProcessGroup that this process is "
            "in (of a DeviceMesh: mesh.get_group('sp'))"
        )
    return group


def gathered(fact: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's ``fact``, of one shape on all, as [ranks, *fact.shape]; without a gradient."""
    fact = fact.detach().contiguous()
    return collectives.wait_tensor(_all_gather_traced(fact[None], 0, group))


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's x, without a gradient."""
    return collectives.wait_tensor(collectives.all_reduce(x.detach(), "sum", group))


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x [B, T, ...], T the same on all, as [B, ranks · T, ...].

    Differentiable: what each rank's loss asks of a rank's x is added up there, by a reduce-scatter. That makes it a
    collective of the backward pass too.
    """
    return collectives.wait_tensor(_all_gather_autograd(x.contiguous(), 1, check_group(group)))


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
