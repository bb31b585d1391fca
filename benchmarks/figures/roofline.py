"""Arithmetic a second against arithmetic a byte, under what the GPU's memory and its matrix units allow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cases.shapes import FLOOR_UNITS
from benchmarks.figures.canvas import INK, OTHER, OURS, THIRD, beside, drawing, plain
from lightning_attention.bench.attention import BACKWARD, FORWARD
from lightning_attention.bench.peers import OURS as OUR_NAME
from lightning_attention.bench.report import Record, Report
from lightning_attention.training.flops import BLOCK, peak_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BYTES = 2  # of a number in bfloat16
SOFTMAX = "sdpa_cudnn"


def draw(path: Path, shapes: Report) -> None:
    """From records of the case ``shapes``: ours forward and backward, and softmax attention forward."""
    (copy,) = shapes.find("copy")
    bandwidth, peak = copy["bytes_per_second"], peak_flops(shapes.environment["device"])
    if peak is None:
        raise ValueError(f"the peak of {shapes.environment['device']} is not among those of training/flops.py")
    groups = (
        ("linear, forward", OURS, "o", FORWARD, OUR_NAME),
        ("linear, backward", THIRD, "^", BACKWARD, OUR_NAME),
        ("softmax (cuDNN), forward", OTHER, "s", FORWARD, SOFTMAX),
    )
    with drawing(path, (9, 4.7), 1) as (ax,):
        reached = []
        for label, colour, marker, pass_, implementation in groups:
            records = shapes.find("shapes", **{"pass": pass_, "implementation": implementation})
            reached += (found := [point(r) for r in records if "ms" in r])
            ax.plot(*zip(*found, strict=True), marker, color=colour, label=label, markersize=7, alpha=0.8)
        roof(ax, bandwidth, peak, [x for x, _ in reached])
        ax.legend(loc="lower right", labelcolor="linecolor")


def point(record: Record) -> tuple[float, float]:
    """FLOPs a byte that must be moved, and TFLOP/s, of a record."""
    flops = flops_per_token(record) * math.prod(record[x] for x in "BTH")
    moved = FLOOR_UNITS[record["pass"]] * BYTES * math.prod(record[x] for x in "BTHD")
    return flops / moved, flops / record["ms"] / 1e9


def flops_per_token(record: Record) -> float:
    """One head's arithmetic for a token (docs/algorithm.md).

    Linear: 4·C·D within its block of C tokens and 4·D² with the state, and backward that of three such sweeps. Softmax,
    forward: 2·T·D, the products with half of the tokens.
    """
    T, D = record["T"], record["D"]
    if record["implementation"] != OUR_NAME:
        return 2 * T * D
    return (4 * BLOCK * D + 4 * D * D) * (3 if record["pass"] == BACKWARD else 1)


def roof(ax: Axes, bandwidth: float, peak: float, intensities: list[float]) -> None:
    """The two limits: bytes a second times FLOPs a byte, and the peak."""
    low, high, ridge = min(intensities) / 8, max(intensities) * 1.6, peak / bandwidth
    ax.plot([low, ridge, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], color=INK, linewidth=1.6)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs for each byte that must be moved", title="TFLOP/s reached")
    plain(ax.xaxis, ax.yaxis)
    words = f"memory: {bandwidth / 1e12:.1f} TB/s,\na copy as measured"
    beside(ax, words, (ridge / 4, peak / 4e12), INK, ha="right", va="bottom", xytext=(-6, 2))
    words = f"matrix units: {peak / 1e12:.0f} TFLOP/s in bfloat16"
    beside(ax, words, (high, peak / 1e12), INK, ha="right", xytext=(0, 10))
