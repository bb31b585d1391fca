"""How a sequence is cut into blocks: which pairs of tokens are multiplied, and which go through the state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures.canvas import INK, OTHER, OURS, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, blocks: int = 4, block: int = 6, log_decay: float = -0.12) -> None:
    """``blocks`` blocks of ``block`` tokens; a pair's square is as dark as its weight λ^(t−s)."""
    with drawing(path, (10, 4.6)) as (pairs, chain):
        weights(pairs, blocks, block, log_decay)
        states(chain, blocks)


def weights(ax: Axes, blocks: int, block: int, log_decay: float) -> None:
    """Token t against token s: what attention inside of blocks gives, and what the state does."""
    from matplotlib.patches import Rectangle

    T = blocks * block
    for t in range(T):
        for s in range(t + 1):
            inside = t // block == s // block
            shade = 0.1 + 0.88 * math.exp(log_decay * (t - s))
            square = Rectangle((s, t), 0.92, 0.92, color=OURS if inside else OTHER, alpha=shade, linewidth=0)
            ax.add_patch(square)
    for edge in range(0, T + 1, block):  # a block's rows end at its own columns
        ax.plot([edge - 0.04] * 2, [max(0, edge - block), T], color=INK, linewidth=0.6, alpha=0.5)
        ax.plot([0, min(T, edge + block)], [edge - 0.04] * 2, color=INK, linewidth=0.6, alpha=0.5)
    ax.set(xlim=(-0.2, T + 0.2), ylim=(T + 0.2, -0.2), aspect="equal", xlabel="token s, which is read",
           ylabel="token t, which reads", title="The weight of each pair")  # fmt: skip
    ax.set_xticks([(i + 0.5) * block for i in range(blocks)], [f"block {i + 1}" for i in range(blocks)])
    ax.set_yticks([(i + 0.5) * block for i in range(blocks)], [f"block {i + 1}" for i in range(blocks)])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for row, colour, text in (
        (0, OURS, "within a block:\nmasked attention"),
        (1, OTHER, "between blocks:\nthrough the state"),
    ):
        ax.text((blocks - 1) * block, (row + 0.5) * block, text, color=colour, ha="center", va="center")


def states(ax: Axes, blocks: int) -> None:
    """The chain of blocks with the state that each hands to the next."""
    from matplotlib.patches import FancyBboxPatch

    def box(x: float, y: float, width: float, text: str, colour: str) -> None:
        shape = FancyBboxPatch((x, y), width, 0.62, boxstyle="round,pad=0.02,rounding_size=0.08", facecolor="none",
                               edgecolor=colour, linewidth=1.6)  # fmt: skip
        ax.add_patch(shape)
        ax.text(x + width / 2, y + 0.31, text, ha="center", va="center", color=colour, fontsize=10)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.4})

    for i in range(blocks):
        y = -1.25 * i
        box(0, y, 1.5, f"q, k, v\nblock {i + 1}", INK)
        box(2.3, y, 2.1, "(Q Kᵀ ⊙ M) V", OURS)
        box(5.2, y, 1.5, f"output\nblock {i + 1}", INK)
        arrow((1.55, y + 0.31), (2.25, y + 0.31), INK)
        arrow((4.45, y + 0.31), (5.15, y + 0.31), OURS)
        if i + 1 == blocks:
            continue
        # The state leaves below, is read by the rows of the next block, and goes on into the next state.
        ax.text(
            3.35, y - 0.315, f"state $S_{{{i + 1}}}$: D × E numbers", ha="center", va="center", color=OTHER, fontsize=10
        )
        arrow((1.0, y - 0.06), (1.75, y - 0.3), OTHER)
        arrow((4.9, y - 0.33), (5.5, y - 0.6), OTHER)
        if i + 2 < blocks:
            arrow((1.9, y - 0.45), (1.9, y - 1.4), OTHER)
    ax.set(xlim=(-0.1, 6.9), ylim=(-1.25 * (blocks - 1) - 0.15, 0.85), title="What each block reads and leaves")
    ax.set_axis_off()
