"""The record of a run: one JSON object per line, and a curve without doubles or gaps after a resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_attention.errors import InputError
from lightning_attention.training.checkpoint import atomic_text
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.disk import writing
from lightning_attention.training.progress import HeldOutLoss


class Record:
    """What a run has measured: how long it took, its losses, and the lines about them in metrics.jsonl."""

    def __init__(self, config: TrainConfig) -> None:
        """Nothing is measured yet, and the clock stands."""
        self._config = config
        self.seconds = 0.0  # spent on this run by all the processes that worked on it, before this one
        self.eval_seconds = 0.0  # of the latest validation
        self.held_out: HeldOutLoss | None = None
        self.bits_per_byte: float | None = None  # of the steps up to the last logged one, as is the speed
        self.tokens_per_second: float | None = None
        self.mean_loss = MeanLoss()

    def open(self, path: Path, resume_step: int | None) -> MetricsLog:
        """Start the clock and the file, whose lines after `resume_step` go."""
        self._started = time.perf_counter() - self.seconds
        self._log = MetricsLog(path, resume_step)
        return self._log

    def spent(self) -> float:
        """Seconds spent on this run so far."""
        return time.perf_counter() - self._started

    def log_training(self, step: int, planned_steps: int | None, **values: float) -> None:
        """A line about the steps since the last one; `values` are the latest step's, and `tokens_per_second`."""
        nats, self.bits_per_byte = self.mean_loss.take()
        self.tokens_per_second = values["tokens_per_second"]
        self._write(step, planned_steps, loss=nats, bits_per_byte=self.bits_per_byte, **values)

    def log_validation(self, step: int, planned_steps: int | None, loss: tuple[float, float], seconds: float) -> None:
        """A line about a validation: its loss in nats per token and bits per byte, and how long it took."""
        self.held_out, self.eval_seconds = HeldOutLoss(loss[1], step), seconds
        self._write(step, planned_steps, val_loss=loss[0], val_bits_per_byte=loss[1])

    def _write(self, step: int, planned_steps: int | None, **values: float) -> None:
        counts = {"step": step, "tokens": step * self._config.tokens_per_step, "seconds": round(self.spent(), 3)}
        plan = {"planned_steps": planned_steps} if self._config.max_minutes else {}
        self._log.write({**counts, **plan, **values})

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        held_out = self.held_out and asdict(self.held_out)
        loss = self.mean_loss.state()
        return {"seconds": self.spent(), "eval_seconds": self.eval_seconds, "held_out": held_out, "mean_loss": loss}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.seconds, self.eval_seconds = state["seconds"], state["eval_seconds"]
        self.held_out = HeldOutLoss(**state["held_out"]) if state["held_out"] else None
        self.mean_loss.restore(state["mean_loss"])


class MeanLoss:
    """The mean loss over the tokens since it was last asked for, without waiting for the device at every step."""

    def __init__(self) -> None:
        """No tokens yet."""
        self._nats = torch.zeros((), dtype=torch.float64, device="cpu")
        self._tokens, self._bytes = 0, 0

    def add(self, loss: Tensor, tokens: int, text_bytes: int) -> None:
        """Take in a batch: its loss in nats per token, how many tokens it has and how many bytes they stand for."""
        self._nats = self._nats.to(loss.device) + loss.double() * tokens
        self._tokens += tokens
        self._bytes += text_bytes

    def take(self) -> tuple[float, float]:
        """The mean in nats per token and in bits per byte. It starts anew."""
        nats = float(self._nats)
        means = (nats / self._tokens, nats / math.log(2) / max(1, self._bytes))
        self.restore(MeanLoss().state())
        return means

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two logged steps."""
        return {"nats": float(self._nats), "tokens": self._tokens, "bytes": self._bytes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._nats = torch.tensor(state["nats"], dtype=torch.float64, device="cpu")
        self._tokens, self._bytes = state["tokens"], state["bytes"]


class MetricsLog:
    """Appends to a JSONL file. Every line has a `step`, and either a training `loss` or a `val_loss`."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Start an empty file, or with `resume_step` keep the lines up to that step and go on from there."""
        kept = [] if resume_step is None else [line for line in read_metrics(path) if line["step"] <= resume_step]
        self._path = path
        atomic_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing(path):
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
