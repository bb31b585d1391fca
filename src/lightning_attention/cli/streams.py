"""Standard streams that outlive their terminal and can write every character."""

from __future__ import annotations

import io
import sys
from typing import Any


class LastingStream:
    """A stream for a run that must not end because nobody reads its output any more.

    When the terminal is closed or the program at the other end of a pipe ends, what is written is lost and the run goes
    on. Its record is in metrics.jsonl.
    """

    def __init__(self, stream: Any) -> None:
        """Write to `stream`, which is None where the process was started without one."""
        self._stream = stream or io.StringIO()

    def write(self, text: str) -> int:
        """Write if somebody still reads."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._stream = io.StringIO()
        return len(text)

    def flush(self) -> None:
        """Do nothing: every write flushes."""

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)


def show_every_character() -> None:
    """Write characters that a stream's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
