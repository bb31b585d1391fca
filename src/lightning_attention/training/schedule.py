"""Learning rate as a function of the step, and how many steps a time budget buys."""

from __future__ import annotations

import math

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
    budget: float, spent: float, step: int, per_step: float, eval_seconds: float, eval_every: int
) -> int:
    """How many steps in all fill `budget` seconds when the first `step` took `spent` and others take `per_step` each.

    Validations (`eval_seconds` each, one at the end included) are paid out of the budget.
    """
    if eval_every:
        per_step += eval_seconds / eval_every
    left = budget - spent - eval_seconds
    return step + max(1, int(left / per_step))
