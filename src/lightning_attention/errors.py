"""The errors that the command turns into one line and an exit status; any other exception is a fault of the package."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=Exception)


class InputError(Exception):
    """What the user gave cannot be used; exit status 2. The message is one line: what it is, and what is wanted."""


class DiskError(Exception):
    """A file of a run cannot be written; exit status 1. The message is one line."""


class DivergedError(Exception):
    """A loss, a gradient or a weight is no longer a finite number; exit status 1. The message is one line."""


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal came before the first had been answered; exit status 128 and the signal's number."""

    def __init__(self, signal_name: str) -> None:
        """Take the signal's name, as "SIGINT"."""
        super().__init__(signal_name)
        self.signal_name = signal_name


def is_told_elsewhere(error: BaseException) -> bool:
    """Whether this error of a run in several processes is one that another process tells the user."""
    return getattr(error, "told_elsewhere", False)


def told_elsewhere(error: E) -> E:
    """The same error, for a process that leaves the telling to another."""
    error.told_elsewhere = True  # type: ignore[attr-defined]
    return error
