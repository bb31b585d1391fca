"""The error of the output against float64, by length and by decay: ours, the peers' and the naive recurrence's."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures.canvas import FOURTH, INK, OTHER, OURS, THIRD, by_length, drawing
from lightning_attention.bench.peers import is_ours
from lightning_attention.bench.report import Record, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PEERS = [(colour, marker) for marker in "s^" for colour in (OTHER, THIRD, FOURTH)]


def draw(path: Path, numerics: Report) -> None:
    """From records of the case ``numerics``, a column a type: by length at the slowest decay but one, and by decay."""
    records = numerics.find("numerics")
    slow, longest = sorted({r["log_decay"] for r in records})[-2], max(r["T"] for r in records)
    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    with drawing(path, (3.6 * len(dtypes), 6.4), len(dtypes), rows=2) as axes:
        for dtype, lengths, decays in zip(dtypes, axes, axes[len(dtypes) :], strict=False):
            of_type = [r for r in records if r["dtype"] == dtype]
            curves(lengths, [(r["T"], r) for r in of_type if r["log_decay"] == slow])
            lengths.set(title=dtype)
            by_length(lengths, sorted({r["T"] for r in records}), f"tokens, log_decay {slow:g}".replace("-", "−"))
            curves(decays, [(-r["log_decay"], r) for r in of_type if r["T"] == longest])
            decays.set(xscale="log", xlabel=f"−log_decay, {longest:,} tokens")
        for ax in axes[:: len(dtypes)]:
            ax.set(ylabel="relative error of the output")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=5, labelcolor="linecolor")


def curves(ax: Axes, points: list[tuple[float, Record]]) -> None:
    """A line for each implementation, wide for ours and dotted for the naive one.

    An error that is no number is left out.
    """
    names = dict.fromkeys((r["implementation"], r["label"]) for _, r in points)
    styles = cycle(PEERS)
    for name, label in names:
        line = sorted(
            (x, error)
            for x, r in points
            if r["implementation"] == name
            if math.isfinite(error := float(r.get("relative_error", math.nan)))
        )
        if is_ours(name):
            style: dict[str, Any] = {"color": OURS, "linewidth": 5, "solid_capstyle": "round"}
        elif name == "naive":
            style = {"color": INK, "linestyle": ":", "marker": "x"}
        else:
            colour, marker = next(styles)
            style = {"color": colour, "linestyle": "--", "marker": marker, "markersize": 4}
        if line:
            ax.plot(*zip(*line, strict=True), label=label, **style)
    ax.set(yscale="log")
