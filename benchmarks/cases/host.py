"""CPU time of an eager call, on a shape that the device is done with at once."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.harness.timing import host_us
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape, result_or_error
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.lengths import labels
from lightning_attention.bench.peers import ATTENTION, Peer, ours
from lightning_attention.bench.render import Table
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
            run.report.add(SUITE, **{"pass": pass_}, implementation=i.name, label=i.label, **result)
            run.say(f"host cost  {pass_:<16} {i.name:<20} " + result.get("error", f"{result.get('us', 0):.1f} µs"))


def show(report: Report) -> Iterator[Shown]:
    """One table."""
    records = report.find(SUITE)
    found = {(r["implementation"], r["pass"]): f"{r['us']:.1f}" if "us" in r else "failed" for r in records}
    rows = [[label, *(found.get((name, p), "") for p in (FORWARD, BOTH))] for name, label in labels(records).items()]
    if rows:
        yield Table("CPU time of an eager call (µs)", ["", FORWARD, BOTH], rows)


CASE = Case(measure, show, REPEATS, operations=(ATTENTION,), peers=("sdpa",), backends=True)
