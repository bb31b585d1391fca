"""How many steps a run takes, and the learning rate of each."""

from __future__ import annotations

import math
import statistics
from collections import deque

from lightning_attention.training.config import DEFAULT_DECAY_FRACTION, DEFAULT_STEPS, TrainConfig


class Schedule:
    """Which step is the last one.

    The number of steps is given, or fitted to a time budget: after the warm-up, then at every logged step, because
    the load of the machine may change, and a plan from the first seconds alone has missed the budget by half.

    Args:
        config: the settings of the run.
        windows_per_epoch: windows in one pass over the training text, for `max_epochs`.
    """

    def __init__(self, config: TrainConfig, windows_per_epoch: int) -> None:
        """Plan the given number of steps; with a time budget there is no plan yet."""
        self._config = config
        epochs = math.inf if config.max_epochs is None else config.max_epochs
        self._most_steps = epochs * windows_per_epoch / config.windows_per_step
        self.step_seconds: deque[float] = deque(maxlen=50)  # of the latest steps
        self.planned_steps: int | None = None
        if config.max_minutes is None:
            self._plan(config.steps or DEFAULT_STEPS)

    def is_complete(self, step: int) -> bool:
        """Whether the run ends after so many steps."""
        return self.planned_steps is not None and step >= self.planned_steps

    def is_due(self, every: int, step: int) -> bool:
        """Whether `step` is the last step or a multiple of `every`; with 0 there is only the last."""
        return self.is_complete(step) or (every > 0 and step % every == 0)

    def tokens_per_second(self) -> float:
        """The mean speed since the last logged step, over at most 50 steps."""
        recent = list(self.step_seconds)[-self._config.log_every :]
        return self._config.tokens_per_step * len(recent) / sum(recent)

    def fit_to_budget(self, step: int, spent: float, eval_seconds: float) -> None:
        """Plan as many steps as fill `max_minutes`, if it is set and this step is one to plan at.

        A warm-up that takes all of the budget ends with it.

        Args:
            step: steps taken.
            spent: seconds they took, with everything else the run did.
            eval_seconds: how long a validation takes.
        """
        if self._config.max_minutes is None or self.is_complete(step):
            return
        budget = self._config.max_minutes * 60
        if step < self._config.warmup_steps and spent < budget:
            return
        if self.planned_steps is None or self.is_due(self._config.log_every, step):
            per_step = statistics.median(self.step_seconds)
            self._plan(steps_in_budget(budget, spent, step, per_step, eval_seconds, self._config.eval_every), step)

    def _plan(self, steps: int, taken: int = 0) -> None:
        """Plan at most as many steps as `max_epochs` allows, and at least those already taken."""
        self.planned_steps = max(taken, math.ceil(min(steps, self._most_steps)))


def learning_rate(config: TrainConfig, step: int, planned_steps: int | None) -> float:
    """Linear warm-up to the peak, then down to `final_lr` of the peak at the last planned step, as `schedule` says.

    "cosine" falls along half a cosine from the end of the warm-up. "wsd" (warm-up, stable, decay) stays at the peak and
    falls linearly over the last `decay_fraction` of all steps, or from the end of the warm-up where that is later.

    `planned_steps` may be None (not known yet) during the warm-up, which does not depend on it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if planned_steps is None:
        raise ValueError(f"planned_steps is None at step {step}; it must be known after the warm-up")
    at_peak = config.warmup_steps  # the last step at the peak
    if config.schedule == "wsd":
        decaying = math.ceil(planned_steps * (config.decay_fraction or DEFAULT_DECAY_FRACTION))
        at_peak = max(at_peak, planned_steps - 1 - decaying)
    progress = min(1.0, max(0.0, (step - at_peak) / max(1, planned_steps - 1 - at_peak)))
    left = 1 - progress if config.schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


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
