"""CPU time of an eager call, on a shape that the device is done with at once."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.harness.timing import host_us
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape, result_or_error
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import ATTENTION, Peer, ours
from lightning_attention.bench.render import pivot
from lightning_attention.bench.report import Report

SUITE = "host"
SHAPE = Shape(1, 64, 1, 64)
REPEATS = {"cuda": 400, "cpu": 40}  # on a CPU the work itself is in the time, which a second or two is enough for


def _us(problem: Problem, peer: Peer, pass_: str, repeats: int) -> dict[str, float]:
    call = problem.call(peer, pass_)
    call()
    return {"us": host_us(call, problem.device, repeats=repeats)}


def measure(run: Run) -> None:
    """Microseconds of the calling thread, of every implementation."""
    problem = Problem(SHAPE, torch.bfloat16, run.device)
    for i in [ours(run.backend), *run.peers]:
        for pass_ in (FORWARD, BOTH):
            run.add(SUITE, i, **{"pass": pass_}, **result_or_error(partial(_us, problem, i, pass_, run.scale)))


def show(report: Report) -> Iterator[Shown]:
    """One table."""
    return pivot("CPU time of an eager call (µs)", {"": "label"}, report.find(SUITE),
                 lambda r: {r["pass"]: f"{r['us']:.1f}" if "us" in r else "failed"})  # fmt: skip


CASE = Case(measure, show, REPEATS, operations=(ATTENTION,), peers=("sdpa",), backends=True)
