import gc
import time
import weakref
from contextlib import nullcontext

import pytest
import torch

from lightning_attention.bench.timing import Call, Timing, captured, copy_rate, host_us, peak_bytes, time_calls, wall_ms
from lightning_attention.bench.timing import _turns as turns
from lightning_attention.serving import cuda_graphs


def test_timing_is_the_median_with_its_range():
    assert Timing.of([3.0, 1.0, 100.0]) == Timing(ms=3.0, min_ms=1.0, max_ms=100.0, repeats=3)


def test_wall_ms_sees_a_sleep(cpu):
    assert 20 <= wall_ms(lambda: time.sleep(0.02), cpu) < 200


class Graph:
    """In place of a CUDA graph: it knows the tensors that calls wrote to while they were captured, and owns none."""

    capturing: "Graph | None" = None

    def __init__(self) -> None:
        self.written: list[weakref.ref[torch.Tensor]] = []

    def __enter__(self) -> None:
        Graph.capturing = self

    def __exit__(self, *_: object) -> None:
        Graph.capturing = None

    def replay(self) -> None:
        for tensor in self.written:
            x = tensor()
            assert x is not None, "a replay wrote to freed memory"
            x += 1


class Stream:
    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, other: "Stream") -> None: ...


def add_one_to_a_pool_of_its_own() -> tuple[Call, "weakref.ref[torch.Tensor]"]:
    pool = torch.zeros(3)

    def call() -> None:
        if Graph.capturing is None:
            pool.add_(1)
        else:
            Graph.capturing.written.append(weakref.ref(pool))

    return call, weakref.ref(pool)


def test_what_a_captured_call_writes_to_lives_as_long_as_its_replay(monkeypatch):
    stand_ins = {
        "CUDAGraph": Graph, "graph": lambda graph, pool, stream: graph, "Stream": Stream, "current_stream": Stream,
        "stream": lambda _: nullcontext(),
    }  # fmt: skip
    monkeypatch.setattr(cuda_graphs, "_stream", Stream)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    call, pool = add_one_to_a_pool_of_its_own()
    replay = captured(call, torch.device("cuda"))
    assert pool().tolist() == [1, 1, 1]  # warmed up
    del call
    gc.collect()
    replay()
    replay()
    assert pool().tolist() == [3, 3, 3]
    del replay
    gc.collect()
    assert pool() is None  # nothing else kept it


def test_on_a_cpu_nothing_is_captured(cpu):
    assert captured(len, cpu) is len


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


def test_copy_rate_is_that_of_a_memory(cpu):
    assert 1e8 < copy_rate(cpu) < 1e13  # between a very bad day and any machine there is


def test_host_us_sees_a_busy_thread(cpu):
    assert 1000 <= host_us(lambda: time.sleep(0.001), cpu, repeats=5) < 20_000
