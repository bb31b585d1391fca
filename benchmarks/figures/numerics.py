"""The error of the output against float64, by length and by decay: ours, the peers' and the naive recurrence's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures.canvas import OTHER, OURS, THIRD, by_length, drawing
from lightning_attention.bench.peers import is_ours
from lightning_attention.bench.report import Record, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"float32": OURS, "float16": THIRD, "bfloat16": OTHER}


def draw(path: Path, numerics: Report) -> None:
    """From records of the case ``numerics``: by length at the slowest decay but one, by decay at the longest length."""
    records = numerics.find("numerics")
    slow, longest = sorted({r["log_decay"] for r in records})[-2], max(r["T"] for r in records)
    with drawing(path, (10, 4.5)) as (lengths, by_decay):
        curves(lengths, [(r["T"], r) for r in records if r["log_decay"] == slow])
        by_length(lengths, sorted({r["T"] for r in records}), "tokens in a sequence")
        lengths.set(ylabel="relative error of the output", title=f"log_decay {slow:g}".replace("-", "−"))
        curves(by_decay, [(-r["log_decay"], r) for r in records if r["T"] == longest])
        by_decay.legend(ncols=2, loc="upper right", labelcolor="linecolor")
        by_decay.set(
            xscale="log",
            xlabel="−log_decay: slow decays on the left",
            ylim=(None, 300),
            title=f"{longest:,} tokens, by decay",
        )


def curves(ax: Axes, points: list[tuple[float, Record]]) -> None:
    """A line for each type, solid for ours, dashed for peers and dotted for the naive one.

    An error that is no number is left out, and a type that an implementation has not.
    """
    for name in dict.fromkeys(r["implementation"] for _, r in points):
        own, is_naive = is_ours(name), name == "naive"
        for dtype, colour in COLOURS.items():
            line = sorted(
                (x, error)
                for x, r in points
                if (r["implementation"], r["dtype"]) == (name, dtype)
                if math.isfinite(error := float(r.get("relative_error", math.nan)))
            )
            if line:
                style, label = "o-" if own else "x:" if is_naive else "s--", dtype if own else f"{dtype}, {name}"
                ax.plot(*zip(*line, strict=True), style, color=colour, linewidth=2 if own else 1.4, label=label)
    ax.set(yscale="log")
