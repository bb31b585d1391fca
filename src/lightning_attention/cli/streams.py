"""Standard streams that outlive their terminal, and that can say whatever there is to say."""

from __future__ import annotations

import io
import sys
from typing import Any


class LastingStream:
    """A stream for a run that must not end because nobody listens any more.

    When the terminal is closed or the program at the other end of a pipe ends, what is written is lost and the run goes
    on. Its record is in metrics.jsonl.
    """

    def __init__(self, stream: Any) -> None:
        """Write to `stream`, which is None where the process was started without one."""
        self._stream = stream or io.StringIO()

    def write(self, text: str) -> int:
        """Write if somebody listens."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._stream = io.StringIO()
        return len(text)

    def flush(self) -> None:
        """Nothing is left: every write flushes."""

    def __getattr__(self, name: str) -> Any:
        """Be like the stream in all else."""
        return getattr(self._stream, name)


def show_every_character() -> None:
    """Write what a stream's encoding does not know as escapes, rather than to fail on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
