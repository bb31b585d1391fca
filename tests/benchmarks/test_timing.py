import gc
import time
import weakref
from contextlib import nullcontext

import torch

from benchmarks.harness.timing import captured, copy_rate, host_us
from lightning_attention.bench.timing import Call
from lightning_attention.serving import cuda_graphs


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


def test_copy_rate_is_that_of_a_memory(cpu):
    assert 1e8 < copy_rate(cpu) < 1e13  # between a very bad day and any machine there is


def test_host_us_sees_a_busy_thread(cpu):
    assert 1000 <= host_us(lambda: time.sleep(0.001), cpu, repeats=5) < 20_000
