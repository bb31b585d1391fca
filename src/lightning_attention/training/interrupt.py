"""Turn Ctrl-C, SIGTERM and SIGHUP into a request that the trainer sees between two steps."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from lightning_attention.errors import StoppedAtOnce

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class StopRequest:
    """Inside the `with` block the first signal sets `signal_name`, the second raises StoppedAtOnce, the third kills.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self, acknowledge: Callable[[str, bool], None] | None = None) -> None:
        """No request yet.

        Args:
            acknowledge: called at once, in a thread of its own, with a signal's name and whether it is the second.
                Python hands a signal to the main thread only when the call into PyTorch that it is in returns.
        """
        self.signal_name: str | None = None
        self._acknowledge = acknowledge
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Take over the signals; only a process's main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._heard, self._bell = socket.socketpair()
            self._bell.setblocking(False)
            self._previous_bell = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._listener.start()
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if hasattr(self, "_listener"):
            signal.set_wakeup_fd(self._previous_bell)
            self._bell.close()
            self._listener.join()
            self._heard.close()

    def _listen(self) -> None:
        """Acknowledge what the C part of Python's signal handler writes: a byte for every signal."""
        heard = 0
        while byte := self._heard.recv(1):
            if byte[0] in self._previous and self._acknowledge:
                heard += 1
                self._acknowledge(signal.Signals(byte[0]).name, heard > 1)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature is given)
        name = signal.Signals(number).name
        if self.signal_name is None:
            self.signal_name = name
            return
        for taken in self._previous:
            signal.signal(taken, signal.SIG_DFL)
        raise StoppedAtOnce(name)
