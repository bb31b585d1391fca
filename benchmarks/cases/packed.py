"""Packed batches of equal, skewed and random lengths, against dense ones of as many tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lightning_attention.bench import attention
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import ours
from lightning_attention.bench.render import pivot
from lightning_attention.bench.report import Record, Report

SUITE = "packed"


class Scale(NamedTuple):
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
    dense = {f"dense {B} × {scale.tokens // B}": [scale.tokens // B] * B for B in (1, 16)}
    for H in scale.heads:
        for name, lengths in (dense | packings(scale.tokens)).items():
            B, bounds = len(lengths) if name in dense else 1, None
            if name not in dense:
                bounds = torch.tensor([0, *lengths], device=run.device).cumsum(0, dtype=torch.int32)
            problem = Problem(Shape(B, scale.tokens // B, H, scale.D), scale.dtype, run.device)
            peer = ours(run.backend, cu_seqlens=bounds)
            for pass_ in (FORWARD, BOTH):
                (result,) = attention.measure([peer], problem, pass_, seconds=scale.seconds).values()
                row = problem.sizes | {"packing": name, "sequences": len(lengths), "pass": pass_}
                run.add(SUITE, peer, **row, **result)


def show(report: Report) -> Iterator[Shown]:
    """Each batch's time, and what it is of that of one dense sequence of as many tokens."""
    records = report.find(SUITE)
    dense = {(r["H"], r["pass"]): r["ms"] for r in reversed(records) if "ms" in r}  # the first of each

    def cells(r: Record) -> dict[str, str]:
        return {r["pass"]: f"{r['ms']:.4f} ({r['ms'] / dense[r['H'], r['pass']]:.2f})" if "ms" in r else "failed"}

    title = "Packed batches (ms; over one dense sequence of as many tokens)"
    yield from pivot(title, {"H": "H", "batch": "packing"}, records, cells, words=2)


CASE = Case(measure, show, SCALES, backends=True)
