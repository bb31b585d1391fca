"""What a run has to show: after a step, and at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on the held-out text, and after which step it was measured."""

    bits_per_byte: float
    step: int


@dataclass(frozen=True)
class GpuUse:
    """What a run makes of its GPUs."""

    tokens_per_second: float  # a GPU
    mfu: float | None  # share of the peak; None where the peak is not known or the run is not in bf16
    peak_memory: int  # bytes that tensors took at most, on this process's GPU, since it began


@dataclass(frozen=True)
class Progress:
    """What there is to show after a step. The loss and the speed are means over the steps up to the last logged one."""

    step: int
    planned_steps: int | None  # None while a time budget is still being measured
    logged: bool  # whether this step was written to metrics.jsonl
    bits_per_byte: float | None
    tokens_per_second: float | None
    held_out: HeldOutLoss | None
    gpu: GpuUse | None = None  # None on a CPU
    sample: str | None = None  # a prompt and what the model makes of it, after steps at which that is due


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
