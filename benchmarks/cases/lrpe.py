"""A training step through TransNormerLLM's first layer, whose LRPE doubles q and k, against its second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.render import Table
from lightning_attention.bench.report import Report
from lightning_attention.bench.timing import Call, time_calls, wall_ms

if TYPE_CHECKING:
    from lightning_attention.models.transnormer.block import TransnormerDecoderLayer

SUITE, BOUND = "lrpe", 1.7
FLUSHES = 16  # 4 ms before each call, in which the host enqueues a layer's kernels


class Scale(NamedTuple):
    """Sizes of a model, and batches of B sequences of T tokens."""

    models: tuple[str, ...]
    B: int
    T: int
    dtype: torch.dtype
    seconds: float


SCALES = {
    "cuda": Scale(("385M", "1B"), 4, 8192, torch.bfloat16, 0.4),
    "cpu": Scale(("385M",), 1, 32, torch.float32, 0.0),
}


def step(layer: TransnormerDecoderLayer, x: Tensor, positions: Tensor, grad: Tensor) -> Call:
    """Forward and backward, with the gradients of x and of all parameters."""
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x, positions=positions), wanted, grad)


def measure(run: Run) -> None:
    """Both layers in turns; ``ratio``: the first's time over the second's."""
    from lightning_attention.models.transnormer import TransnormerConfig
    from lightning_attention.models.transnormer.block import TransnormerDecoderLayer

    scale: Scale = run.scale
    for name in scale.models:
        config = TransnormerConfig.from_name(name)
        layers = [TransnormerDecoderLayer(config, i).to(run.device, scale.dtype) for i in (0, 1)]
        x = torch.randn(scale.B, scale.T, config.hidden_size, device=run.device, dtype=scale.dtype, requires_grad=True)
        grad = torch.randn_like(x)
        positions = torch.arange(scale.T, device=run.device).expand(scale.B, scale.T)
        calls = {
            which: step(layer, x, positions, grad) for which, layer in zip(("first", "second"), layers, strict=True)
        }
        for call in calls.values():
            wall_ms(call, run.device)
        found = time_calls(calls, run.device, seconds=scale.seconds, flushes=FLUSHES)
        ratio = found["first"].ms / found["second"].ms
        for which, timing in found.items():
            judged: dict[str, Any] = {"ratio": ratio, "bound": BOUND, "met": ratio <= BOUND} if which == "first" else {}
            sizes: dict[str, Any] = {"B": scale.B, "T": scale.T, "dtype": scale.dtype}
            run.add(SUITE, model=name, layer=which, **sizes, **asdict(timing), **judged)


def show(report: Report) -> Iterator[Shown]:
    """Each model's two layers."""
    rows = []
    for r in report.find(SUITE, layer="first"):
        (second,) = report.find(SUITE, layer="second", model=r["model"])
        sizes = f"{r['B']}, {r['T']}"
        rows.append(
            [r["model"], sizes, f"{r['ms']:.3f}", f"{second['ms']:.3f}", f"{r['ratio']:.2f}", f"≤ {r['bound']}"]
        )
    if rows:
        columns = ["model", "B, T", "first layer, ms", "second, ms", "ratio", "wanted"]
        yield Table("Forward and backward through a layer", columns, rows, words=2)


CASE = Case(measure, show, SCALES, needs=("transformers",))
