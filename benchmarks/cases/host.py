"""CPU time of an eager call, on a shape that the device is done with at once.

``us``: of the calling thread, on the clock. ``busy_us``: of the processor, all threads together; autograd has its own
for the backward pass. Beside ours stands an autograd.Function that allocates what ours does, and no more.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.pool import DECODE, PREFILL
from benchmarks.harness.timing import busy_us, host_us
from lightning_attention import (
    RecentTokens,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape, has, result_or_error
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


def _serving(device: torch.device) -> dict[str, Callable[[], object]]:
    """A call of each operation of an inference engine, by its name, on one sequence."""
    problem = Problem(SHAPE, torch.bfloat16, device)
    (q, k, v, _), log_decay = (x[0, :2] for x in problem.tensors), problem.log_decay
    state = torch.zeros(1, SHAPE.H, SHAPE.D, SHAPE.D, device=device)
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32, device=device)
    accepted = torch.ones(2, dtype=torch.bool, device=device)
    found: dict[str, Callable[[], object]] = {}
    for rings in ("", ", rings"):
        recent = RecentTokens.empty(1, SHAPE.H, SHAPE.D, SHAPE.D, device=device) if rings else None
        pool: dict[str, Any] = {"log_decay": log_decay, "state": state, "slots": slots, "recent": recent}
        packed = pool | {"cu_seqlens": cu_seqlens}
        found |= {
            DECODE + rings: partial(lightning_attention_decode, q[:1], k[:1], v[:1], **pool),
            PREFILL + rings: partial(lightning_attention_prefill, q, k, v, **packed),
            f"verify{rings}": partial(lightning_attention_verify, q, k, v, **packed),
            f"commit{rings}": partial(lightning_attention_commit, k, v, accepted=accepted, **packed),
        }
    return found


def measure(run: Run) -> None:
    """Microseconds of every implementation, and of our operations of an inference engine."""
    problem = Problem(SHAPE, torch.bfloat16, run.device)
    own = ours(run.backend)
    for i in [own, EMPTY, *run.peers]:
        for pass_ in (x for x in (FORWARD, BOTH) if has(i, x)):
            run.add(SUITE, i, **{"pass": pass_}, **result_or_error(partial(_attention, problem, i, pass_, run.scale)))
    for name, call in _serving(run.device).items():
        run.add(SUITE, own, **{"pass": name}, **result_or_error(partial(_us, call, run.device, run.scale)))


def show(report: Report) -> Iterator[Shown]:
    """A table of attention, and one of an inference engine's operations."""
    records = report.find(SUITE)
    attention = [r for r in records if r["pass"] in (FORWARD, BOTH)]
    serving = [r for r in records if r not in attention]
    yield from pivot("CPU time of an eager call (µs; of all threads)", {"": "label"}, attention,
                     lambda r: {r["pass"]: _cell(r)})  # fmt: skip
    yield from pivot("The same of one sequence in a pool", {"": lambda r: r["pass"].partition(", ")[0]}, serving,
                     lambda r: {r["pass"].partition(", ")[2] or "without rings": _cell(r)})  # fmt: skip


def _cell(r: dict[str, Any]) -> str:
    busy = f" ({r['busy_us']:.1f})" if "busy_us" in r else ""
    return f"{r['us']:.1f}{busy}" if "us" in r else "failed"


CASE = Case(measure, show, REPEATS, operations=(ATTENTION,), peers=("sdpa",), backends=True)
