"""The record of a run: one JSON object per line, with no duplicates or gaps after a resume."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_attention.errors import InputError
from lightning_attention.training.checkpoint import atomic_text
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.disk import writing
from lightning_attention.training.flops import GpuMeter
from lightning_attention.training.progress import GpuUse, HeldOutLoss
from lightning_attention.training.schedule import Schedule
from lightning_attention.training.tracking import Tracker, open_tracker


class Record:
    """What a run has measured: the time, the losses, and their lines in metrics.jsonl."""

    def __init__(self, config: TrainConfig, schedule: Schedule, meter: GpuMeter | None) -> None:
        """Nothing is measured yet, and the clock is stopped."""
        self._config, self._schedule, self._meter = config, schedule, meter
        self.seconds = 0.0  # spent on this run by all the processes that worked on it, before this one
        self.eval_seconds = 0.0  # of the latest validation
        self.held_out: HeldOutLoss | None = None
        self.bits_per_byte: float | None = None  # of the steps up to the last logged one, as is the speed
        self.tokens_per_second: float | None = None
        self.gpu: GpuUse | None = None
        self.mean_loss = MeanLoss()

    def open(self, path: Path | None, resume_step: int | None) -> Record:
        """Start the clock, the file, whose lines after `resume_step` go, and the tracker.

        None where another process writes them.
        """
        self._started = time.perf_counter() - self.seconds
        self._log = MetricsLog(path, resume_step)
        self._tracker: Tracker | None = None
        if path is None:
            return self
        settings = self._config.as_dict()
        try:
            self._tracker = open_tracker(self._config.tracker, path.parent, settings, read_metrics(path), resume_step)
        except BaseException:
            self._log.close()
            raise
        return self

    def close(self) -> None:
        """Close the file and the tracker."""
        self._log.close()
        if self._tracker:
            self._tracker.close()

    def spent(self) -> float:
        """Seconds spent on this run so far."""
        return time.perf_counter() - self._started

    def log_training(self, step: int, **latest: float) -> None:
        """Write a line about the steps since the last one, with the values of the latest step."""
        nats, self.bits_per_byte = self.mean_loss.take()
        self.tokens_per_second = self._schedule.tokens_per_second()
        speed = self.tokens_per_second
        use = {}
        if self._meter:
            self.gpu = self._meter.read(speed)
            use = {"tokens_per_second_per_gpu": self.gpu.tokens_per_second, "peak_memory": self.gpu.peak_memory}
            use |= {} if self.gpu.mfu is None else {"mfu": self.gpu.mfu}
        self._write(step, loss=nats, bits_per_byte=self.bits_per_byte, **latest, tokens_per_second=speed, **use)

    def log_validation(self, step: int, loss: tuple[float, float], seconds: float) -> None:
        """Write a line about a validation: its loss in nats per token and bits per byte, and how long it took."""
        self.held_out, self.eval_seconds = HeldOutLoss(loss[1], step), seconds
        self._write(step, val_loss=loss[0], val_bits_per_byte=loss[1])

    def _write(self, step: int, **values: float) -> None:
        counts = {"step": step, "tokens": step * self._config.tokens_per_step, "seconds": round(self.spent(), 3)}
        plan = {"planned_steps": self._schedule.planned_steps} if self._config.max_minutes else {}
        line = {**counts, **plan, **values}
        self._log.write(line)
        if self._tracker:
            self._tracker.write(line)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "seconds": self.spent(),
            "eval_seconds": self.eval_seconds,
            "held_out": self.held_out and asdict(self.held_out),
            "mean_loss": {**vars(self.mean_loss), "nats": float(self.mean_loss.nats)},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.seconds, self.eval_seconds = state["seconds"], state["eval_seconds"]
        self.held_out = HeldOutLoss(**state["held_out"]) if state["held_out"] else None
        self.mean_loss = MeanLoss(**state["mean_loss"])


@dataclass
class MeanLoss:
    """The mean loss over the tokens since it was last asked for, without waiting for the device at every step."""

    nats: Tensor | float = 0.0  # a float64 scalar on the device of the losses
    tokens: int = 0
    text_bytes: int = 0

    def add(self, loss: Tensor, tokens: int, text_bytes: int) -> None:
        """Take in a batch: its loss in nats per token, how many tokens it has and how many bytes they stand for."""
        self.nats = self.nats + loss.double() * tokens
        self.tokens += tokens
        self.text_bytes += text_bytes

    def take(self) -> tuple[float, float]:
        """The mean in nats per token and in bits per byte; then start again."""
        nats, tokens, text_bytes = float(self.nats), self.tokens, self.text_bytes
        self.nats, self.tokens, self.text_bytes = 0.0, 0, 0
        return nats / tokens, nats / math.log(2) / max(1, text_bytes)


class MetricsLog:
    """Appends to a JSONL file. Every line has a `step`, and either a training `loss` or a `val_loss`."""

    def __init__(self, path: Path | None, resume_step: int | None = None) -> None:
        """Start an empty file, or with `resume_step` keep the lines up to that step and go on from there.

        None: write nothing.
        """
        self._file: io.FileIO | None = None
        if path is None:
            return
        kept = [] if resume_step is None else [line for line in read_metrics(path) if line["step"] <= resume_step]
        self._path = path
        atomic_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing(path):
            # Without a buffer, in which a full disk would leave what cannot be written.
            self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; it is in the file when this returns."""
        if self._file is None:
            return
        rest = memoryview((json.dumps(record) + "\n").encode())
        with writing(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
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
