"""What a token costs by length: the time of training, and the time and memory of a step of generation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures.canvas import OTHER, OURS, beside, by_length, drawing, plain
from lightning_attention.bench.attention import BOTH
from lightning_attention.bench.peers import OUR_MODEL
from lightning_attention.bench.render import number
from lightning_attention.bench.report import Record, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOFTMAX, SOFTMAX_MODEL = "sdpa_cudnn", "llama"


def draw(path: Path, shapes: Report, serve: Report) -> None:
    """From records of the cases ``shapes``, at the H and D of the first of them, and ``serve``, at a batch of one."""
    first = shapes.find("shapes")[0]
    training = shapes.find("shapes", **{"pass": BOTH, "H": first["H"], "D": first["D"]})
    generation = serve.find("serve", B=1)
    with drawing(path, (11, 4), 3) as (train, step, memory):
        panel(
            train,
            "Training: µs a token",
            "tokens in a sequence",
            {name: points(largest(training, name), "T", "us_per_token") for name in ("lightning_attention", SOFTMAX)},
        )
        for ax, title, field, unit in (
            (step, "Generation: ms a token", "ms", 1.0),
            (memory, "Generation: GB kept of the context", "state_bytes", 1e9),
        ):
            found = ([r for r in generation if r["implementation"] == x] for x in (OUR_MODEL, SOFTMAX_MODEL))
            lines = {r[0]["implementation"]: points(r, "context", field, unit) for r in found}
            panel(ax, title, "tokens before it", lines)


def largest(records: list[Record], implementation: str) -> list[Record]:
    """An implementation's record with the most sequences at each length."""
    own = [r for r in records if r["implementation"] == implementation and "ms" in r]
    return [max((r for r in own if r["T"] == T), key=lambda r: r["B"]) for T in sorted({r["T"] for r in own})]


def points(records: list[Record], x: str, y: str, unit: float = 1.0) -> list[tuple[float, float]]:
    """The field ``y`` in ``unit`` against ``x``; records of a failure have none."""
    return sorted((r[x], r[y] / unit) for r in records if y in r)


def panel(ax: Axes, title: str, x: str, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    """One line in our colour and one of softmax attention, each with its last value beside it."""
    for (name, line), colour, label in zip(lines.items(), (OURS, OTHER), ("linear", "softmax"), strict=True):
        ax.plot(*zip(*line, strict=True), color=colour, marker="o" if colour == OURS else "s", linewidth=2, label=name)
        beside(ax, f"{label}\n{number(line[-1][1])}", line[-1], colour)
    by_length(ax, sorted({x for line in lines.values() for x, _ in line}), x)
    ax.set(yscale="log", title=title)
    plain(ax.yaxis)
    ax.margins(y=0.1)
