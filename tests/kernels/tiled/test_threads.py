"""The work of a call shared out among threads: the same bits, no traces, and errors that come out."""

import subprocess
import sys
from collections.abc import Iterator
from threading import Thread, active_count, get_ident
from time import sleep
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lightning_attention import lightning_attention
from lightning_attention.kernels.tiled import plan, threads
from tests.support import Solution, make_problem, misses, solve_with


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


PROBLEMS = [{"B": 2, "T": 200, "H": 3}, {"lengths": [100, 0, 70], "padding": 4, "H": 5}, {"T": 130, "H": 1}]


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("kw", PROBLEMS)
def test_results_are_those_of_one_thread(two_threads: None, kw: dict[str, int], invariant: bool):
    problem = make_problem(D=8, E=6, **kw)

    def solve() -> Solution:
        return solve_with(problem, "tiled", batch_invariant=invariant)

    alone = solve()
    with patch.object(plan, "SHARED", 0):
        shared = solve()
    assert not misses(shared, problem)
    if invariant:
        for name in ("output", "final_state", "q", "k", "v", "initial_state"):
            assert torch.equal(getattr(alone, name), getattr(shared, name)), name


def test_the_threads_of_the_caller_are_left_alone(two_threads: None):
    idents = set()

    def work(space: Tensor) -> None:
        idents.add((get_ident(), torch.get_num_threads()))
        space.add_(torch.ones(()))

    spaces = torch.zeros(2, 1).unbind()
    threads.run([work] * 9, spaces)
    assert sum(spaces).item() == 9
    assert get_ident() not in {ident for ident, _ in idents}
    assert {count for _, count in idents} == {1}
    assert torch.get_num_threads() == 2


def test_an_error_in_a_share_is_the_callers(two_threads: None):
    def fail(space: Tensor) -> None:
        raise ValueError("what went wrong")

    with pytest.raises(ValueError, match="what went wrong"):
        threads.run([fail] * 3, torch.zeros(2, 1).unbind())


def test_inference_mode_and_gradients_reach_every_thread(two_threads: None):
    q = torch.randn(1, 100, 2, 4, requires_grad=True)
    with patch.object(plan, "SHARED", 0):
        with torch.inference_mode():
            inferred = lightning_attention(q, q, q, backend="tiled").output
        out = lightning_attention(q, q, q, backend="tiled").output
        out.sum().backward()
    assert torch.equal(out, inferred)
    assert q.grad is not None


def test_without_threads_the_caller_does_the_work(two_threads: None):
    threads._executor.cache_clear()
    before, start, count = active_count(), Thread.start, 0

    def start_one(self: Thread) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise RuntimeError("can't start new thread")
        start(self)

    spaces = torch.zeros(2, 1).unbind()
    with patch.object(Thread, "start", start_one):
        threads.run([lambda space: space.add_(1)] * 5, spaces)
    assert sum(spaces).item() == 5
    assert torch.get_num_threads() == 2
    for _ in range(100):  # the one that started does not wait for the other
        if active_count() <= before:
            break
        sleep(0.05)
    assert active_count() <= before


def test_a_thread_that_outlives_the_main_one_gets_its_results():
    # The interpreter ends its pools of threads as soon as the main thread is done.
    code = """
import atexit, threading, torch
from lightning_attention import lightning_attention

torch.set_num_threads(2)
q = torch.randn(1, 512, 8, 64)
right = lightning_attention(q, q, q).output

def again():
    torch.testing.assert_close(lightning_attention(q, q, q).output, right)
    print("right")

def later():
    threading.main_thread().join()
    again()

threading.Thread(target=later).start()
atexit.register(again)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["right", "right"], done.stderr
