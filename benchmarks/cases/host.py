"""CPU time of an eager call, on a shape that the device is done with at once."""

from collections.abc import Iterator
from functools import partial
from typing import Any

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


def _us(problem: Problem, peer: Peer, pass_: str, repeats: int) -> dict[str, Any]:
    call = problem.call(peer, pass_)
    call()
    return {"us": host_us(call, problem.device, repeats=repeats)}


def measure(run: Run) -> None:
    """Microseconds of the calling thread, of every implementation."""
    problem = Problem(SHAPE, torch.bfloat16, run.device)
    for i in [ours(run.backend), *run.peers]:
        for pass_ in (FORWARD, BOTH):
            result = result_or_error(partial(_us, problem, i, pass_, run.scale))
            run.add(SUITE, **{"pass": pass_}, implementation=i.name, label=i.label, **result)


def show(report: Report) -> Iterator[Shown]:
    """One table."""
    if records := report.find(SUITE):
        title = "CPU time of an eager call (µs)"
        yield pivot(
            title, [""], records, lambda r: (r["label"],),
            lambda r: {r["pass"]: f"{r['us']:.1f}" if "us" in r else "failed"},
        )  # fmt: skip


CASE = Case(measure, show, REPEATS, operations=(ATTENTION,), peers=("sdpa",), backends=True)
