"""The record of a run in a tracker's own form. metrics.jsonl is the record: a tracker is filled from it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lightning_attention.errors import InputError
from lightning_attention.training.disk import writing

PROJECT = "lightning-attention"


class Tracker(Protocol):
    """Something that shows numbers by step."""

    def write(self, line: dict[str, Any]) -> None:
        """Take in a line of metrics.jsonl."""

    def close(self) -> None:
        """Hand over what is left."""


class TensorBoard:
    """Event files in a folder of their own, written again from the record each time a run is resumed."""

    def __init__(self, run: Path, config: dict[str, Any], resumed_at: int | None) -> None:
        """Begin an event file in `run`/tensorboard; earlier ones there are deleted."""
        del config, resumed_at
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run / "tensorboard"
        remove_events(run)
        with writing(self._folder):
            self._writer = SummaryWriter(str(self._folder))

    def write(self, line: dict[str, Any]) -> None:
        """Every number of a line under its name."""
        with writing(self._folder):
            for name, value in _numbers(line).items():
                self._writer.add_scalar(name, value, line["step"])
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        with writing(self._folder):
            self._writer.close()


class Logger:
    """A run of a library with `init`, `log` and `finish`, as in wandb and others like it."""

    package: str

    def __init__(self, run: Path, config: dict[str, Any], resumed_at: int | None) -> None:
        """Begin a run of that library; a resumed one is another run of the same group, with the earlier points."""
        library, name = import_module(self.package), run.resolve().name
        # What these libraries print is no result of the command.
        with redirect_stdout(sys.stderr):
            try:
                self._run = library.init(
                    project=PROJECT,
                    group=name,
                    name=name if resumed_at is None else f"{name} from step {resumed_at}",
                    config=config,
                )
            except Exception as error:  # each has its own; of an account, a network, a folder
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise InputError(f"tracker is {self.package}, which could not start: {reason}") from error

    def write(self, line: dict[str, Any]) -> None:
        """Every number of a line under its name."""
        self._run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        """Wait until everything is handed over."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


class Trackio(Logger):
    """Runs on this machine, shown by `trackio show`."""

    package = "trackio"


class Wandb(Logger):
    """Runs of an account, or on this machine with WANDB_MODE=offline."""

    package = "wandb"


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def require_tracker(name: str) -> None:
    """Raise InputError when the package of a tracker is not installed."""
    if name == "none":
        return
    found = find_spec(name)
    if found is None or found.origin is None:  # a folder of that name, as wandb makes one, is found but is no package
        raise InputError(f"tracker is {name}, whose package is not installed: pip install {name}")


def open_tracker(
    name: str, run: Path, config: dict[str, Any], lines: list[dict[str, Any]], resumed_at: int | None
) -> Tracker | None:
    """A tracker that is filled with the record.

    Args:
        name: none, or a key of TRACKERS.
        run: the folder of the run, which gives it its name.
        config: the settings of the run, for those trackers that show them.
        lines: all lines of metrics.jsonl.
        resumed_at: the step that the run goes on from; None for a new one.

    Raises:
        InputError: the package is not there, or does not start.
    """
    if resumed_at is None:
        remove_events(run)
    if name == "none":
        return None
    require_tracker(name)
    tracker = TRACKERS[name](run, config, resumed_at)
    for line in lines:
        tracker.write(line)
    return tracker


def remove_events(run: Path) -> None:
    """Delete the event files of a run; other files in their folder stay."""
    for path in (run / "tensorboard").glob("events.out.tfevents.*"):
        path.unlink()


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, (int, float))}
