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


def test_warm_up_then_the_peak_then_a_line():
    config = make_config({"lr": 2.0, "final_lr": 0.1, "warmup_steps": 4, "schedule": "wsd", "decay_fraction": 0.25})
    rates = [learning_rate(config, step, 40) for step in range(40)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:30] == [2.0] * 26  # the last ten of forty steps decay
    assert rates[30:] == pytest.approx([2.0 - 0.18 * n for n in range(1, 11)])
    assert rates[39] == pytest.approx(0.2)
    by_default = make_config({"lr": 2.0, "warmup_steps": 4, "schedule": "wsd"})
    assert [learning_rate(by_default, step, 40) for step in (31, 32)] == [2.0, pytest.approx(2.0 - 1.9 / 8)]


def test_a_decay_over_more_than_what_the_warm_up_leaves_starts_with_it():
    config = make_config({"lr": 1.0, "final_lr": 0.0, "warmup_steps": 4, "schedule": "wsd", "decay_fraction": 1.0})
    assert [learning_rate(config, step, 9) for step in range(3, 9)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_needs_no_plan_and_the_rest_does(schedule):
    config = make_config({"warmup_steps": 4, "schedule": schedule})
    assert learning_rate(config, 3, None) == learning_rate(config, 3, 1000)
    with pytest.raises(ValueError, match="planned_steps is None at step 4"):
        learning_rate(config, 4, None)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_shorter_than_its_warm_up(schedule):
    config = make_config({"warmup_steps": 10, "schedule": schedule})
    assert all(0 < learning_rate(config, step, 3) <= config.lr for step in range(3))


def test_steps_in_budget():
    # 10 s are spent on 20 steps; 50 s are left, minus 2 s for the last validation, at 1/8 s + 2 s / 16 a step.
    assert steps_in_budget(60, 10, 20, 0.125, eval_seconds=2, eval_every=16) == 20 + 192
    assert steps_in_budget(60, 10, 20, 0.125, eval_seconds=2, eval_every=0) == 20 + 384
    assert steps_in_budget(5, 10, 20, 0.125, eval_seconds=0, eval_every=0) == 21
