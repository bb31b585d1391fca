"""The processes of a run and what they tell each other on the host. One process without a launcher is a team too."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightning_attention.errors import DiskError, DivergedError, E, InputError, told_elsewhere

T = TypeVar("T")

# The first rank reads and tokenizes while the others wait. A rank that dies closes its connections, which ends the
# wait at once; this is for hosts that vanish.
PATIENCE = timedelta(hours=12)


class Team:
    """A process among those of a run; the first of them owns the run's folder.

    What is agreed here goes through the CPU (gloo), beside what the device computes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """The processes of a group; None for this one alone."""
        self._group = group
        self.rank = 0 if group is None else dist.get_rank()
        self.size = 1 if group is None else dist.get_world_size()
        self.is_first = self.rank == 0
        self.is_launched = group is not None

    @classmethod
    def join(cls, device: str = "auto") -> Team:
        """The processes that a launcher such as torchrun started, or this one alone. A collective call.

        Args:
            device: the setting of that name; a process group that is there already is used as it is.

        Raises:
            InputError: the environment announces several processes, but does not say how to reach them.
        """
        if not dist.is_initialized():
            names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            if missing := [name for name in names if not os.environ.get(name)]:
                if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
                    raise InputError(
                        f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} are not set: "
                        "start the processes with torchrun"
                    )
                return cls()
            on_gpus = device != "cpu" and torch.cuda.is_available()
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
            except RuntimeError as error:
                if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                    raise
                # https://github.com/pytorch/pytorch/issues/135712: they read what was left by those before them
                raise InputError(
                    "the processes do not find each other after a restart; "
                    "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts"
                ) from error
        return cls(dist.new_group(backend="gloo", timeout=PATIENCE))

    def new_group(self) -> dist.ProcessGroup | None:
        """The same processes on the CPU, for another thread; None for one alone. A collective call."""
        return None if self._group is None else dist.new_group(backend="gloo")

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` on the first rank; all ranks return its result, a plain value, or raise its error."""
        return self.each(action if self.is_first else _nothing)[0]

    def each(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Run `action` on every rank; all return the list of plain results, or raise the error of the lowest rank.

        `action` must not communicate. In another thread than the run's, give a `group` from `new_group`.
        """
        if self._group is None:
            return [action()]
        result, error = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        told = self.gather((result, None if error is None else _as_told(error)), group)
        for rank, (_, failure) in enumerate(told):
            if failure is None:
                continue
            kind, text = failure
            if error is not None and (rank == 0 == self.rank or kind is RuntimeError):
                raise error  # with its traceback
            heard = kind(text if rank == 0 else f"rank {rank}: {text}")
            raise self.same(heard) from error
        return [value for value, _ in told]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Every rank's value, a plain one."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group or self._group)
        return values

    def same(self, error: E) -> E:
        """An error that every rank has met; the first reports it."""
        return error if self.is_first else told_elsewhere(error)

    def sum(self, *numbers: int) -> list[int]:
        """The sums of whole numbers over all ranks."""
        if self._group is None:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(sums, group=self._group)
        return sums.tolist()

    def leave(self) -> None:
        """Leave the group, at the end of a run that all processes ended."""
        if self._group is not None:
            dist.destroy_process_group()
            self._group = None


def _as_told(error: Exception) -> tuple[type[Exception], str]:
    for kind in (InputError, DiskError, DivergedError, MemoryError):
        if isinstance(error, kind):
            return kind, str(error)
    return RuntimeError, f"{type(error).__name__}: {error}"


def _nothing() -> Any:
    return None
