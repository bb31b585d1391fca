"""What a run has to show: after a step, and at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on the held-out text, and after which step it was measured."""

    bits_per_byte: float
    step: int


@dataclass(frozen=True)
class Progress:
    """What there is to show after a step. The loss and the speed are means over the steps up to the last logged one."""

    step: int
    planned_steps: int | None  # None while a time budget is still being measured
    logged: bool  # whether this step was written to metrics.jsonl
    bits_per_byte: float | None
    tokens_per_second: float | None
    held_out: HeldOutLoss | None


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    planned_steps: int | None
    held_out: HeldOutLoss | None
    stopped_by: str | None  # a signal's name, or None when the run is complete
    checkpoint: Path
    plot: Path
    metrics: Path


class MeanLoss:
    """The mean of the loss since it was last asked for, without waiting for the device at every step."""

    def __init__(self) -> None:
        """No steps yet."""
        self._sum = torch.zeros((), dtype=torch.float64, device="cpu")
        self._steps, self._tokens, self._bytes = 0, 0, 0

    def add(self, loss: Tensor, tokens: int, text_bytes: int) -> None:
        """Take in a step: its loss in nats per token, how many tokens it read and how many bytes they stand for."""
        self._sum = self._sum.to(loss.device) + loss.double()
        self._steps += 1
        self._tokens += tokens
        self._bytes += text_bytes

    def take(self) -> tuple[float, float]:
        """The mean in nats per token and in bits per byte. It starts anew."""
        nats = float(self._sum) / self._steps
        bits_per_byte = nats * self._tokens / math.log(2) / max(1, self._bytes)
        self.restore(MeanLoss().state())
        return nats, bits_per_byte

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two logged steps."""
        return {"sum": float(self._sum), "steps": self._steps, "tokens": self._tokens, "bytes": self._bytes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._sum = torch.tensor(state["sum"], dtype=torch.float64, device="cpu")
        self._steps, self._tokens, self._bytes = state["steps"], state["tokens"], state["bytes"]
