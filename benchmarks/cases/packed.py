"""Packed batches of equal, skewed and random lengths, against dense ones of as many tokens."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lightning_attention import lightning_attention
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.render import pivot
from lightning_attention.bench.report import Report
from lightning_attention.bench.timing import Call, time_calls

SUITE = "packed"


@dataclass(frozen=True)
class Scale:
    """So many tokens in all, with each number of heads."""

    tokens: int
    heads: tuple[int, ...]
    D: int
    dtype: torch.dtype
    seconds: float


SCALES = {
    "cuda": Scale(131_072, (32, 8), 128, torch.bfloat16, 0.4),
    "cpu": Scale(4096, (4,), 64, torch.float32, 0.2),
}


def packings(tokens: int) -> dict[str, list[int]]:
    """Lengths that sum to ``tokens``: 16 equal ones; one of three quarters and 64 others; 32 drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def drawn(total: int, count: int) -> list[int]:
        order = torch.randperm(total - 1, generator=generator, device="cpu")
        cuts = (order[: count - 1] + 1).sort().values.tolist()
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]

    long = tokens * 3 // 4
    return {
        "uniform": [tokens // 16] * 16,
        "skewed": [*drawn(tokens - long, 64), long],
        "random": drawn(tokens, 32),
    }


def measure(run: Run) -> None:
    """Packed batches against one dense sequence of as many tokens, and against 16 dense ones."""
    scale: Scale = run.scale
    for H in scale.heads:
        for B in (1, 16):
            T = scale.tokens // B
            _measure(run, Shape(B, T, H, scale.D), f"dense {B} × {T}", None)
        for name, lengths in packings(scale.tokens).items():
            _measure(run, Shape(1, scale.tokens, H, scale.D), name, lengths)


def _measure(run: Run, shape: Shape, name: str, lengths: list[int] | None) -> None:
    problem, cu_seqlens = Problem(shape, run.scale.dtype, run.device), None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=run.device).cumsum(0, dtype=torch.int32)
    q, k, v, do = problem.tensors
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, problem.log_decay, cu_seqlens=cu_seqlens, backend=run.backend).output

    calls: dict[str, Call] = {
        FORWARD: lambda: forward(q, k, v),
        BOTH: lambda: torch.autograd.grad(forward(*leaves), leaves, do),
    }
    for call in calls.values():
        call()
    sequences = shape.B if lengths is None else len(lengths)
    for pass_, timing in time_calls(calls, run.device, seconds=run.scale.seconds).items():
        row = asdict(shape) | {"packing": name, "sequences": sequences, "pass": pass_}
        run.add(SUITE, **row, **asdict(timing))


def show(report: Report) -> Iterator[Shown]:
    """Each batch's time, and what it is of that of one dense sequence of as many tokens."""
    records = report.find(SUITE)
    dense: dict[tuple[int, str], float] = {}
    for r in records:
        dense.setdefault((r["H"], r["pass"]), r["ms"])
    if records:
        yield pivot(
            "Packed batches (ms; over one dense sequence of as many tokens)",
            ["H", "batch"],
            records,
            lambda r: (str(r["H"]), r["packing"]),
            lambda r: {r["pass"]: f"{r['ms']:.4f} ({r['ms'] / dense[r['H'], r['pass']]:.2f})"},
            words=2,
        )


CASE = Case(measure, show, SCALES, backends=True)
