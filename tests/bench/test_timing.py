import time

import pytest
import torch

from lightning_attention.bench.timing import Timing, peak_bytes, time_calls, wall_ms
from lightning_attention.bench.timing import _turns as turns


def test_timing_is_the_median_with_its_range():
    assert Timing.of([3.0, 1.0, 100.0]) == Timing(ms=3.0, min_ms=1.0, max_ms=100.0, repeats=3)


def test_wall_ms_sees_a_sleep(cpu):
    assert 20 <= wall_ms(lambda: time.sleep(0.02), cpu) < 200


def test_time_calls_tells_slow_from_fast_and_repeats_the_fast_one_more(cpu):
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)}
    timed = time_calls(calls, cpu, seconds=0.08)
    assert 20 <= timed["slow"].min_ms <= timed["slow"].ms <= timed["slow"].max_ms
    assert 2 <= timed["fast"].ms < timed["slow"].ms
    assert 3 <= timed["slow"].repeats < timed["fast"].repeats <= 100


def test_a_call_slower_than_the_budget_is_still_timed_three_times(cpu):
    assert time_calls({"slow": lambda: time.sleep(0.02)}, cpu, seconds=0.001)["slow"].repeats == 3


def test_turns_are_spread_evenly():
    order = turns({"often": 6, "seldom": 2})
    assert order.count("often") == 6
    assert order.count("seldom") == 2
    first, second = (i for i, name in enumerate(order) if name == "seldom")
    assert order[first:second].count("often") == 3


def test_peak_bytes_counts_what_was_held_at_once(cpu):
    megabyte = 1 << 20

    def call() -> torch.Tensor:
        first = torch.zeros(megabyte, dtype=torch.int8)
        second = torch.zeros(2 * megabyte, dtype=torch.int8)  # 3 MB at once
        del first, second
        return torch.zeros(megabyte, dtype=torch.int8)

    assert peak_bytes(call, cpu) == pytest.approx(3 * megabyte, rel=1e-3)


def test_peak_bytes_of_attention_against_what_must_be_there(cpu):
    x = torch.randn(1, 2, 256, 16, requires_grad=True)

    def call() -> object:
        out = x @ x.mT  # 2 · 256 · 256 floats
        return torch.autograd.grad(out, x, torch.ones_like(out))

    scores = 2 * 256 * 256 * 4
    assert 2 * scores <= peak_bytes(call, cpu) < 3 * scores
