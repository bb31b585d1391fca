"""An SVG that is legible on a light page and on a dark one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK = "#1f2328"  # in the file it is the page's own colour of text: see STYLE
#: Each with contrast enough on white and on near black.
OURS, OTHER, THIRD, FOURTH = "#2a87d0", "#dd6b20", "#1a9e6f", "#b357c4"
STYLE = "<style>svg { color: #1f2328 } @media (prefers-color-scheme: dark) { svg { color: #dfe3e8 } }</style>"

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "lightning-attention",  # the same drawing is the same file
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@contextmanager
def drawing(path: Path, size: tuple[float, float], panels: int = 2, rows: int = 1) -> Iterator[list[Axes]]:
    """Axes side by side, in rows of ``panels``, written to ``path`` (SVG) at the end; ``size`` is in inches."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield list(figure.subplots(rows, panels, squeeze=False, sharey="col").flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    path.write_text(adaptive(path.read_text(encoding="utf-8")), encoding="utf-8")


def adaptive(svg: str) -> str:
    """The file with ink in the colour of text of the reader's scheme, and without spaces at the ends of lines."""
    svg = re.sub(r"(<svg\b[^>]*>)", rf"\1\n {STYLE}", svg, count=1)
    return re.sub(r"[ \t]+$", "", svg.replace(INK, "currentColor").replace(STYLE.replace(INK, "currentColor"), STYLE),
                  flags=re.MULTILINE)  # fmt: skip


def by_length(ax: Axes, values: list[float], label: str) -> None:
    """A logarithmic axis of tokens, marked at powers of four as 1k, 4k, …"""
    from matplotlib.ticker import NullLocator

    from lightning_attention.bench.render import length

    ax.set(xscale="log", xlabel=label)
    ax.set_xticks(values, [length(x) for x in values])
    ax.xaxis.set_minor_locator(NullLocator())


def plain(*axes: Axis) -> None:
    """Logarithmic axes marked at 1, 2 and 5 of each power of ten, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))


def beside(ax: Axes, text: str, point: tuple[float, float], colour: str, **more: Any) -> None:
    """A label a few points from where a line ends."""
    more = {"ha": "left", "va": "center", "xytext": (8, 0)} | more
    ax.annotate(text, point, textcoords="offset points", color=colour, annotation_clip=False, **more)
