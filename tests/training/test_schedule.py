import itertools

import pytest

from lightning_attention.training.config import make_config
from lightning_attention.training.schedule import learning_rate, steps_in_budget


def test_warm_up_then_cosine():
    config = make_config({"lr": 2.0, "final_lr": 0.1, "warmup_steps": 4})
    rates = [learning_rate(config, step, 25) for step in range(25)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx((2.0 + 0.2) / 2)  # halfway between steps 4 and 24
    assert rates[24] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_warm_up_needs_no_plan_and_the_cosine_does():
    config = make_config({"warmup_steps": 4})
    assert learning_rate(config, 3, None) == learning_rate(config, 3, 1000)
    with pytest.raises(ValueError, match="planned_steps is None at step 4"):
        learning_rate(config, 4, None)


def test_a_run_shorter_than_its_warm_up():
    config = make_config({"warmup_steps": 10})
    assert all(0 < learning_rate(config, step, 3) <= config.lr for step in range(3))


def test_steps_in_budget():
    # 10 s are spent on 20 steps; 50 s are left, minus 2 s for the last validation, at 1/8 s + 2 s / 16 a step.
    assert steps_in_budget(60, 10, 20, 0.125, eval_seconds=2, eval_every=16) == 20 + 192
    assert steps_in_budget(60, 10, 20, 0.125, eval_seconds=2, eval_every=0) == 20 + 384
    assert steps_in_budget(5, 10, 20, 0.125, eval_seconds=0, eval_every=0) == 21
