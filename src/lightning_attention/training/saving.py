"""Checkpoints of a run, written by all of its processes and given their names by the first."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lightning_attention.errors import InputError
from lightning_attention.training import checkpoint
from lightning_attention.training.disk import writing
from lightning_attention.training.team import Team
from lightning_attention.training.weights import WeightsToWrite

OPTIMIZER = "optimizer"


class Saver:
    """Writes one checkpoint at a time: immediately in one process, in the background of the training in several.

    A checkpoint is a Hugging Face folder with the trainer's state and, as PyTorch's distributed checkpoint (DCP), the
    optimizer's. It can be read on any mesh. Every process writes its share into a folder with an unfinished name; when
    all of it is on disk the first gives it its name.
    """

    def __init__(self, team: Team) -> None:
        """Nothing is being written. Collective."""
        self._team = team
        self._group = team.new_group()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        target: Path,
        weights: WeightsToWrite,
        optimizer: dict[str, Tensor],
        write_rest: Callable[[Path], None],
        then: Callable[[], None],
    ) -> None:
        """Start to write a checkpoint, once the one before is done; the arguments may change after this returns.

        Args:
            target: its folder, which does not exist.
            weights: this process's share of the model.
            optimizer: the optimizer's tensors by name, DTensors where they are sharded.
            write_rest: writes everything else into the folder that it is given; called on the first rank.
            then: called on the first rank when the checkpoint is whole.

        Raises:
            DiskError: this checkpoint, or the one before it, cannot be written.
        """
        if self._group is None:
            with checkpoint.atomic_folder(target) as folder:
                weights.write(folder)
                write_rest(folder)
                with _dcp_errors():
                    dcp.save({OPTIMIZER: optimizer}, checkpoint_id=folder / OPTIMIZER)
            then()
            return
        self.wait()
        self._team.first(lambda: str(checkpoint.begin_folder(target)))
        folder = checkpoint.unfinished_name(target)
        with _dcp_errors():  # a Future, unless a stager of our own were given
            written: Any = dcp.async_save(
                {OPTIMIZER: optimizer}, checkpoint_id=folder / OPTIMIZER, process_group=self._group
            )

        def write() -> None:
            weights.write(folder)
            if self._team.is_first:
                write_rest(folder)

        def finish() -> None:
            if self._team.is_first:
                checkpoint.finish_folder(target)
                then()

        def work() -> None:
            try:
                error = _error_of(write, target)
                with _dcp_errors():
                    error = _error_of(written.result, target) or error
                error = self._first_error(error)
                if error is not None and self._team.is_first:
                    checkpoint.remove(folder)
                self._error = error or self._first_error(_error_of(finish, target))
            except BaseException as unexpected:  # another process died: `wait` says so
                self._error = unexpected

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise, as far as is known now."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until what was started is whole. Raises DiskError when it cannot be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def load_optimizer(self, folder: Path, optimizer: dict[str, Tensor]) -> None:
        """Read the optimizer's tensors in a checkpoint into those that are given. Collective. Raises InputError."""
        source = folder / OPTIMIZER
        if not source.is_dir():
            raise InputError(
                f"{folder} has no folder {OPTIMIZER}: another version of lightning-attention wrote it. "
                "Resume with that version, or train anew with --overwrite"
            )
        try:
            with _dcp_errors():
                dcp.load({OPTIMIZER: optimizer}, checkpoint_id=source, process_group=self._group)
        except Exception as error:  # a damaged file raises whatever its reader raises
            reason = str(error).partition("\n")[0]
            raise self._team.same(
                InputError(f"cannot load the optimizer in {folder}: {type(error).__name__}: {reason}")
            ) from error

    def _first_error(self, error: Exception | None) -> Exception | None:
        """The error of the lowest rank that has one, on every rank."""

        def fail() -> None:
            if error is not None:
                raise error

        try:
            self._team.each(fail, group=self._group)
        except Exception as agreed:
            return agreed
        return None


def _error_of(action: Callable[[], object], target: Path) -> Exception | None:
    try:
        with writing(target):
            action()
    except Exception as error:
        return error
    return None


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Raise a process's own error, not DCP's BaseException around it; silence DCP's warning about a single process."""
    with ExitStack() as stack:
        if not dist.is_initialized():
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            _, (first, _) = min(error.failures.items(), key=lambda failure: failure[0])
            raise first from error
