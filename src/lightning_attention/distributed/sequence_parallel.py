"""The collectives of sequence parallelism: every rank holds a slice of each sequence, and only states travel.

After LASP-2, arXiv 2502.07563; ``kernels/sequence_parallel.py`` has what is computed from them. Besides the states,
layers and models exchange small facts (``gathered``, ``total``), softmax layers keys and values (``gather_tokens``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, _resolve_process_group

_resolve: Callable[[str], dist.ProcessGroup] = _resolve_process_group  # type: ignore[assignment]

#: What all_gather_into_tensor, since torch 2.13 all_gather_single, calls after 20 µs of Python.
_all_gather = getattr(dist.ProcessGroup, "all_gather_single", None) or dist.ProcessGroup._allgather_base
# Under the name since torch 2.13, or the one before; the first is for the compiler too.
_all_gather_traced = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
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

    Differentiable: the gradients that all ranks have for a rank's x are summed there by a reduce-scatter, so the
    backward pass is collective too.
    """
    return _Gather.apply(x, check_group(group)).transpose(0, 1).flatten(1, 2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None]:
        grad = grads.new_empty(grads.shape[1:])
        _reduce_scatter(grad, grads.contiguous().flatten(0, 1), group=ctx.group)
        return grad, None


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group, in the order of their slices; by its name, because operators take no groups."""

    group_name: str
    rank: int
    size: int

    @classmethod
    def of(cls, group_name: str) -> "Ranks":
        """The ranks of the group that has this name now."""
        group = _resolve(group_name)
        return cls(group_name, group.rank(), group.size())

    def gather(self, message: Tensor, gathered: Tensor, *, meanwhile: bool = False) -> Callable[[], object]:
        """Start to write every rank's message, along the first dimension, to ``gathered``; wait with what is returned.

        On a GPU nothing waits on the host. The collective has a stream of its own only if something is
        to be computed ``meanwhile``: going there and back takes longer than a launch.
        """
        work = _all_gather(_resolve(self.group_name), gathered, message, _OPTIONS[meanwhile])
        return _nothing if work is None else work.wait


def _nothing() -> None:
    """Do nothing: the current stream already has the collective."""
