"""The figure of a run: training and validation loss against tokens read."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from lightning_attention.training.checkpoint import unfinished_name


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the lines of a metrics file into a PNG. Nothing is drawn when there is nothing to draw."""
    # The class rather than pyplot: no window system is looked for, and no global state changes.
    from matplotlib.figure import Figure

    train = [
        (r["tokens"] / 1e3, r["bits_per_byte"]) for r in records if "loss" in r and math.isfinite(r["bits_per_byte"])
    ]
    val = [(r["tokens"] / 1e3, r["val_bits_per_byte"]) for r in records if "val_loss" in r]
    if not train and not val:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9bb8d3", linewidth=1, label="training batch")
    if val:
        axes.plot(*zip(*val, strict=True), color="#c0392b", marker="o", markersize=4, label="held-out text")
        axes.annotate(
            f"{val[-1][1]:.2f}", val[-1], xytext=(0, 8), textcoords="offset points", ha="center", color="#c0392b"
        )
    # The first batches cost 8 bits or more per byte, which would flatten everything that matters.
    lowest = min(bits for _, bits in train + val)
    axes.set_ylim(max(0.0, lowest - 0.3), max(4.0, lowest + 1.0))
    axes.set_xlim(left=0)
    axes.set_xlabel("thousand tokens read")
    axes.set_ylabel("loss, bits per byte of text")
    axes.set_title("Loss in training")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    unfinished = unfinished_name(path)
    figure.savefig(unfinished, dpi=120, format="png")
    os.replace(unfinished, path)
