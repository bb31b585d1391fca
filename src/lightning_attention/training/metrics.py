"""The record of a run: one JSON object per line, and a curve without doubles or gaps after a resume."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_attention.errors import InputError
from lightning_attention.training.checkpoint import atomic_text
from lightning_attention.training.disk import writing


class MetricsLog:
    """Appends to a JSONL file. Every line has a `step`, and either a training `loss` or a `val_loss`."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Start an empty file, or with `resume_step` keep the lines up to that step and go on from there."""
        kept = [] if resume_step is None else [line for line in read_metrics(path) if line["step"] <= resume_step]
        self._path = path
        with writing(path):
            atomic_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            # Without a buffer, in which a full disk would leave what cannot be written.
            self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; it is in the file when this returns."""
        rest = memoryview((json.dumps(record) + "\n").encode())
        with writing(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines. A last line that a killed process left unfinished is skipped.

    Raises InputError for a line that no run wrote.
    """
    if not path.exists():
        return []
    return list(_parse(path, path.read_bytes().split(b"\n")[:-1]))


def _parse(path: Path, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise InputError(f"line {number} of {path} is damaged; delete it, or the file: the run goes on without")
        yield record
