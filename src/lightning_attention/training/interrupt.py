"""Turn Ctrl-C and SIGTERM into a request that the trainer meets between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Inside the `with` block the first SIGINT or SIGTERM sets `signal_name`; the second acts as it always does."""

    def __init__(self) -> None:
        """No request yet."""
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Take over the signals; only a process's main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature is given)
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
