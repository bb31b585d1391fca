"""A process in which Triton interprets its kernels on the CPU.

Whether a kernel is compiled or interpreted is settled when Triton is imported, so the interpreter gets a process of its
own, and tests that compile can run beside those that interpret.
"""

import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from packaging.version import Version, parse

from tests.kernels.triton.support.cutting import cutting
from tests.support import Problem, Solution

interpreted = pytest.mark.skipif(
    parse(version("triton")) < Version("3.9") and parse(version("numpy")) >= Version("2.4"),
    reason="Triton's interpreter works with NumPy 2.4 from Triton 3.9 on",
)


@dataclass(frozen=True)
class Run:
    """What the kernels made of a problem, and how often they joined states of segments."""

    solution: Solution
    scans: int


class Interpreter:
    """Solves problems in the other process, which every test of a session shares (the fixture ``interpreter``)."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start)

    def close(self) -> None:
        self._pool.shutdown()

    def solve(
        self, problem: Problem, *, segments: bool = False, batch_invariant: bool = False, final: bool = True
    ) -> Run:
        """``segments`` cuts sequences every two blocks; without ``final`` the states after them are not computed."""
        return self.call(_solve, problem, segments, batch_invariant, final)

    def states(self, problem: Problem, *, segments: bool = False, reverse: bool = False) -> torch.Tensor:
        """What sequences leave, with time reversed or not."""
        return self.call(_states, problem, segments, reverse)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function at the top of a module returns there; it is pickled, as its arguments are."""
        # Pickled here: left to multiprocessing, every tensor would be a file in shared memory.
        return pickle.loads(self._pool.submit(_answer, pickle.dumps((function, arguments))).result())


@contextmanager
def scalar_masks() -> Iterator[None]:
    """Kernels of others load and store by one mask for all, which the compiler takes and the interpreter refuses."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def broadcast(method: Callable[..., Any], place: int) -> Callable[..., Any]:
        def called(builder: Any, ptrs: Any, *rest: Any) -> Any:
            given = list(rest)
            mask = given[place]
            given[place] = TensorHandle(np.broadcast_to(mask.data.astype(bool), ptrs.data.shape).copy(), mask.dtype)
            return method(builder, ptrs, *given)

        return called

    load = broadcast(InterpreterBuilder.create_masked_load, 0)
    store = broadcast(InterpreterBuilder.create_masked_store, 1)
    with patch.multiple(InterpreterBuilder, create_masked_load=load, create_masked_store=store):
        yield


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("error")
    # Triton before 3.9 takes arrays of one element for numbers, of which NumPy before 2.4 only warns.
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0 to a scalar", DeprecationWarning)
    torch.set_num_threads(1)
    # New tensors are full of NaN, or of the largest integer: what a kernel fails to write, or should not read, shows.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()


def _answer(request: bytes) -> bytes:
    function, arguments = pickle.loads(request)
    return pickle.dumps(function(*arguments))


def _solve(problem: Problem, segments: bool, batch_invariant: bool, want_final: bool) -> Run:
    from lightning_attention.kernels.triton.attention import attention, attention_backward
    from lightning_attention.kernels.triton.scan import scan_kernel

    p, scans = problem, []
    inputs = (p.q, p.k, p.v, p.log_decay, p.initial_state, p.cu_seqlens, p.scale)
    learnable = p.log_decay is not None
    with cutting(segments, p.q.dtype), patch.object(scan_kernel, "pre_run_hooks", [lambda *_, **__: scans.append(1)]):
        out, final = attention(*inputs, want_final, batch_invariant)
        dq, dk, dv, dlog_decay, dinitial = attention_backward(
            p.dout, p.dfinal if want_final else None, *inputs, batch_invariant, learnable
        )
    final = torch.zeros_like(p.dfinal) if final is None else final
    return Run(Solution(out, final, dq, dk, dv, dlog_decay if learnable else None, dinitial), len(scans))


def _states(problem: Problem, segments: bool, reverse: bool) -> torch.Tensor:
    from lightning_attention.kernels.triton.states import states

    p = problem
    with cutting(segments):
        return states(p.k, p.v, p.log_decay, p.cu_seqlens, reverse, False)
