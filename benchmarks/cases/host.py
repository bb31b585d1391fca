"""CPU time of an eager call, on a shape that the device is done with at once.

``us``: of the calling thread, on the clock. ``busy_us``: of the processor, all threads together; autograd has its own
for the backward pass. Beside ours stands an autograd.Function that allocates what ours does, and no more.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.pool import DECODE
from benchmarks.harness.timing import busy_us, host_us
from lightning_attention import lightning_attention_decode
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape, result_or_error
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import ATTENTION, Forward, Peer, ours
from lightning_attention.bench.render import pivot
from lightning_attention.bench.report import Report

SUITE = "host"
SHAPE = Shape(1, 64, 4, 64)
REPEATS = {"cuda": 400, "cpu": 40}  # on a CPU the work itself is in the time, which a second or two is enough for


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(v)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _empty() -> Forward:
    return lambda q, k, v, log_decay: _Empty.apply(q, k, v)  # noqa: ARG005


EMPTY = Peer("empty_function", "an empty autograd.Function", "torch", {ATTENTION: _empty})


def _us(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    call()
    return {"us": host_us(call, device, repeats=repeats), "busy_us": busy_us(call, device, repeats=repeats)}


def _attention(problem: Problem, peer: Peer, pass_: str, repeats: int) -> dict[str, float]:
    return _us(problem.call(peer, pass_), problem.device, repeats)


def _decode(device: torch.device, repeats: int) -> dict[str, float]:
    problem = Problem(SHAPE, torch.bfloat16, device)
    q, k, v, _ = (x[0, :1] for x in problem.tensors)
    state = torch.zeros(1, SHAPE.H, SHAPE.D, SHAPE.D, device=device)
    return _us(partial(lightning_attention_decode, q, k, v, problem.log_decay, state), device, repeats)


def measure(run: Run) -> None:
    """Microseconds of every implementation, and of a decoding step of ours."""
    problem = Problem(SHAPE, torch.bfloat16, run.device)
    own = ours(run.backend)
    for i in [own, EMPTY, *run.peers]:
        for pass_ in (FORWARD, BOTH):
            run.add(SUITE, i, **{"pass": pass_}, **result_or_error(partial(_attention, problem, i, pass_, run.scale)))
    run.add(SUITE, own, **{"pass": DECODE}, **result_or_error(partial(_decode, run.device, run.scale)))


def show(report: Report) -> Iterator[Shown]:
    """One table."""
    return pivot("CPU time of an eager call (µs; of all threads)", {"": "label"}, report.find(SUITE),
                 lambda r: {r["pass"]: _cell(r)})  # fmt: skip


def _cell(r: dict[str, Any]) -> str:
    busy = f" ({r['busy_us']:.1f})" if "busy_us" in r else ""
    return f"{r['us']:.1f}{busy}" if "us" in r else "failed"


CASE = Case(measure, show, REPEATS, operations=(ATTENTION,), peers=("sdpa",), backends=True)
