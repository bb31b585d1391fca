"""Learning rate as a function of the step, and how many steps a time budget buys."""

from __future__ import annotations

import math
import statistics

from lightning_attention.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, planned_steps: int | None) -> float:
    """Linear warm-up, then a cosine down to `final_lr` of the peak at the last planned step.

    `planned_steps` may be None (not known yet) during the warm-up, which does not depend on it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if planned_steps is None:
        raise ValueError(f"planned_steps is None at step {step}; it must be known after the warm-up")
    left = max(1, planned_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / left)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def steps_in_budget(
    budget: float, spent: float, step: int, step_seconds: list[float], eval_seconds: float, eval_every: int
) -> int:
    """How many steps in all fill `budget` seconds when `spent` of them went on the first `step` steps.

    The number is decided once, after the warm-up, and kept in every checkpoint: a schedule that followed the clock
    would be another one on every run, and after every resume. Validations (`eval_seconds` each, one at the end
    included) are paid out of the budget.
    """
    # The median, because the first steps also pay for memory that later ones find ready.
    per_step = statistics.median(step_seconds)
    if eval_every:
        per_step += eval_seconds / eval_every
    left = budget - spent - eval_seconds
    return step + max(1, int(left / per_step))
