"""The four products of a block's step, each with what stands around it, by PyTorch and by the kernels for them.

Over as many copies of the weights as the L2 has no room for, in one CUDA graph. ``by`` "kernels" has no choice in it:
where these are slower, ``nn.projection.project`` takes PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.timing import captured
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.render import Table
from lightning_attention.bench.report import Report
from lightning_attention.bench.timing import time_calls
from lightning_attention.check import relative_error
from lightning_attention.nn.projection import composed
from lightning_attention.ops import backends

SUITE = "products"
L2 = 200e6  # bytes of weights that are read before one comes again


class Scale(NamedTuple):
    """Models by name, with their width and that of SGLU, and rows."""

    models: dict[str, tuple[int, int]]
    rows: tuple[int, ...]
    dtype: torch.dtype
    seconds: float


SCALES = {
    "cuda": Scale(
        {"385M": (1024, 2816), "1B": (2048, 5632), "7B": (4096, 11008)},
        (9, 32, 128, 256, 512, 1024),
        torch.bfloat16,
        0.05,
    ),
    "cpu": Scale({"385M": (1024, 2816)}, (9,), torch.float32, 0.0),
}


def products(
    width: int, glu: int, rows: int, like: Tensor
) -> dict[str, tuple[list[tuple[Tensor, Any]], tuple[Any, ...]]]:
    """By name the weights, a second one beside each or None, and x, gate, residual, eps and silu."""
    new = lambda *shape: torch.randn(shape, device=like.device).to(like.dtype)  # noqa: E731
    shapes = {"qkvu": (width, 4 * width), "out": (width, width), "glu": (width, glu), "down": (glu, width)}
    found = {}
    for name, (K, O) in shapes.items():
        copies = max(2, round(L2 / (K * O * like.itemsize))) if like.is_cuda else 1
        weights = [(new(O, K) / K**0.5, new(O, K) / K**0.5 if name == "glu" else None) for _ in range(copies)]
        gate, residual = (new(rows, K) if name == "out" else None), (new(rows, O) if width == O else None)
        eps = None if name == "down" else 1e-6
        found[name] = weights, (new(rows, K), gate, residual, eps, 2 * width if name == "qkvu" else 0)
    return found


def measure(run: Run) -> None:
    """Microseconds of each product, and the error against float64."""
    scale: Scale = run.scale
    kernel = backends.get("triton").project if run.device.type == "cuda" else None
    ways: dict[str, Callable[..., Tensor]] = {"PyTorch": composed} | ({} if kernel is None else {"kernels": kernel})
    like = torch.empty(0, device=run.device, dtype=scale.dtype)
    for model, (width, glu) in scale.models.items():
        for rows in scale.rows:
            for name, (weights, (x, gate, *rest)) in products(width, glu, rows, like).items():

                def every(way: Callable[..., Tensor]) -> Tensor:
                    for weight, second in weights:  # noqa: B023
                        out = way(x, weight, second, gate, *rest)  # noqa: B023
                    return out

                inputs: tuple[Any, ...] = x, *weights[-1], gate, *rest
                exact = ways["PyTorch"](*(t.double() if isinstance(t, Tensor) else t for t in inputs))
                errors = {by: relative_error(every(way), exact) for by, way in ways.items()}
                calls = {by: captured(partial(every, way), run.device) for by, way in ways.items()}
                for by, timing in time_calls(calls, run.device, seconds=scale.seconds).items():
                    run.add(SUITE, model=model, rows=rows, product=name, by=by, dtype=scale.dtype,
                            relative_error=errors[by], us=timing.ms * 1e3 / len(weights))  # fmt: skip


def show(report: Report) -> Iterator[Shown]:
    """A row for each model and number of rows."""
    records = report.find(SUITE)
    if not records:
        return
    ways, names = (list(dict.fromkeys(r[key] for r in records)) for key in ("by", "product"))
    lines = []
    for model, rows in dict.fromkeys((r["model"], r["rows"]) for r in records):
        us = {(r["product"], r["by"]): r["us"] for r in records if (r["model"], r["rows"]) == (model, rows)}
        cells = [", ".join(f"{us[name, by]:.1f}" for by in ways) for name in names]
        lines.append([model, str(rows), *cells, ", ".join(f"{sum(us[name, by] for name in names):.1f}" for by in ways)])
    yield Table(
        f"Products of a block's step, {' and '.join(ways)} (µs)", ["model", "rows", *names, "all"], lines, words=1
    )


CASE = Case(measure, show, SCALES)
