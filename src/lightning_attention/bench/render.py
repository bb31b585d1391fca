"""How a benchmark shows what it found: tables of plain text, and figures of lines with a label beside each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lightning_attention.bench.peers import is_ours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_attention.bench.report import Record

# Okabe and Ito's hues, which stay apart for colour-blind readers, two of them darkened so that text in them has
# contrast enough; the markers differ too, for print without colour.
OUR_STYLE = ("#0072B2", "o")
#: The others, as they come.
STYLES = (("#009E73", "s"), ("#A84F82", "^"), ("#D55E00", "D"), ("#B07800", "v"), ("#6A5ACD", "P"), ("#222222", "*"))
INK, FAINT, RULE = "#222222", "#6b6b6b", "#e4e4e4"
OTHER_STYLE = (FAINT, "x")  # when those are used up
LEFT = 0.08  # of the width, where axes and text begin: room for 100,000 and the name of the axis

Place = tuple[tuple[int, int], str, str]

#: Where a label may sit from a point of its line: offset in points, horizontal and vertical alignment.
PLACES: tuple[Place, ...] = (
    ((11, 0), "left", "center"),
    ((0, 9), "right", "bottom"),
    ((-9, 4), "right", "bottom"),
    ((0, 9), "center", "bottom"),
    ((0, -9), "right", "top"),
    ((0, -9), "center", "top"),
    ((11, 4), "left", "bottom"),
)


@dataclass(frozen=True)
class Table:
    """Rows of cells under their columns' names, which may have several lines.

    ``words``: how many of the first columns are words and aligned on the left; numbers are aligned on the right.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def lines(self) -> list[str]:
        """The title, the names of the columns, a rule, and a line for each row; a short row ends in empty cells."""
        names = [name.split("\n") for name in self.columns]
        for left, right in reversed(list(pairwise(names))):
            if len(right) > 1 and left[0] == right[0]:  # what several columns share is said above the first
                right[0] = ""
        depth = max(map(len, names))
        above = list(zip(*([""] * (depth - len(name)) + name for name in names), strict=True))
        below = [(*row, *[""] * (len(names) - len(row))) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*above, *below, strict=True)]

        def line(row: Sequence[str]) -> str:
            cells = zip(row, widths, strict=True)
            return "  ".join(x.ljust(w) if i < self.words else x.rjust(w) for i, (x, w) in enumerate(cells)).rstrip()

        rule = "─" * (sum(widths) + 2 * len(widths) - 2)
        return [self.title, *map(line, above), rule, *map(line, below)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def pivot(
    title: str,
    keys: Mapping[str, str | Callable[[Record], str]],
    records: Iterable[Record],
    cells: Callable[[Record], Mapping[str, str]],
    words: int = 1,
) -> Iterator[Table]:
    """A row for each combination of ``keys``, then the cells of its records by column; no table without records.

    ``keys``: for each column head, a field of the records or a function of a record.
    """
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for r in records:
        values = (r[key] if isinstance(key, str) else key(r) for key in keys.values())
        row = tuple(value if isinstance(value, str) else f"{value:,}" for value in values)
        rows.setdefault(row, {}).update(cells(r))
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    if rows:
        filled = [[*k, *(row.get(name, "") for name in columns)] for k, row in rows.items()]
        yield Table(title, [*keys, *columns], filled, words)


@dataclass(frozen=True)
class Line:
    """An implementation's points (x, y), x ascending, and the text beside them."""

    implementation: str
    label: str
    points: Sequence[tuple[float, float]]
    ours: bool
    dash: str = "-"


@dataclass(frozen=True)
class Panel:
    """Lines over a logarithmic x; y is logarithmic too unless it is a ``fraction``, which begins at zero, or has
    ``limits``, between which it is linear.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    fraction: bool = False
    limits: tuple[float, float] | None = None


def lines(
    records: Iterable[Record],
    x: str,
    y: str,
    label: Callable[[Record], str] = lambda last: last["label"],
    dash: str = "-",
) -> list[Line]:
    """A line for each implementation, ours first: the field ``y`` against ``x``, labelled by its last record."""
    found: dict[str, list[Record]] = {}
    for r in sorted(records, key=lambda r: (not is_ours(r["implementation"]), r[x])):
        found.setdefault(r["implementation"], []).append(r)
    return [Line(name, label(line[-1]), [(r[x], r[y]) for r in line], is_ours(name), dash)
            for name, line in found.items()]  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Two panels side by side, with one y axis where they have the same."""

    title: str
    panels: Sequence[Panel]
    caption: str
    subtitle: str = ""

    def save(self, path: Path) -> None:
        """Draw it to ``path`` (PNG)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=(12, 6.6), dpi=150, facecolor="white")
        FigureCanvasAgg(canvas)
        shared = len({panel.y for panel in self.panels}) == 1
        axes = canvas.subplots(1, len(self.panels), sharey=shared)
        canvas.subplots_adjust(left=LEFT, right=0.985, top=0.8, bottom=0.19, wspace=0.05 if shared else 0.18)
        canvas.suptitle(self.title, x=LEFT, y=0.97, ha="left", fontsize=16, fontweight="bold", color=INK)
        canvas.text(LEFT, 0.885, self.subtitle, fontsize=10.5, color=FAINT)
        note = "\n".join(fill(line, 165) for line in self.caption.splitlines())
        canvas.text(LEFT, 0.02, note, fontsize=9, color=FAINT, va="bottom", linespacing=1.5)
        for ax, panel in zip(axes, self.panels, strict=True):
            _frame(ax, panel, [p for p in self.panels if p.y == panel.y])
        others = dict.fromkeys(x.implementation for panel in self.panels for x in panel.lines if not x.ours)
        styles = dict(zip(others, [*STYLES, *[OTHER_STYLE] * len(others)], strict=False))
        for ax, panel in zip(axes, self.panels, strict=True):  # when all limits stand: labels are placed in pixels
            if shared and ax is not axes[0]:
                ax.set_ylabel("")
            _draw(ax, panel.lines, styles)
        canvas.savefig(path)


def length(T: float) -> str:
    """A number of tokens as readers know it: 512, 64k, 1M."""
    return f"{T:g}" if T < 1024 else f"{T / 1024:g}k" if T < 1 << 20 else f"{T / (1 << 20):g}M"


def number(value: float) -> str:
    """Three digits, or all that stand before the decimal point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def caption(environment: dict[str, Any], setting: str) -> str:
    """What was measured, where, with which versions and when."""
    versions = f"lightning-attention {environment['lightning_attention']}, torch {environment['torch']}"
    if environment["device_type"] == "cuda":
        versions += f", Triton {environment['triton']}"
    versions += "".join(f", {name} {version}" for name, version in environment["peers"].items() if version)
    return f"{environment['device']} · {setting} · {versions} · {environment['date'][:10]}"


def _frame(ax: Axes, panel: Panel, alike: Sequence[Panel]) -> None:
    """Axes, with room for the labels; ``alike``: the panels that share the y axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    xs = sorted({x for line in panel.lines for x, _ in line.points})
    ys = [y for other in alike for line in other.lines for _, y in line.points]
    ax.set(xscale="log", xlim=(xs[0] / 1.2, xs[-1] * 1.2), xlabel=panel.x, ylabel=panel.y)
    ax.set_xticks(xs[:: 1 if len(xs) <= 8 else 2 if len(xs) <= 16 else len(xs) // 6])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length(x)))
    ax.xaxis.set_minor_locator(NullLocator())
    if panel.fraction or panel.limits:
        ax.set_ylim(*(panel.limits or (0, 1.25 * max(ys))))
    else:
        ax.set(yscale="log", ylim=(min(ys) / 1.5, max(ys) * 2.5))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    ax.set_title(panel.title, loc="left", fontsize=12, color=INK)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_color(INK)
    ax.grid(True, color=RULE, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b5b5b5")
    ax.tick_params(color="#b5b5b5", labelcolor=INK)


def _draw(ax: Any, lines: Sequence[Line], styles: dict[str, tuple[str, str]]) -> None:
    """The lines, then a label beside each in its colour."""
    import numpy as np
    from matplotlib.patheffects import withStroke

    inked, colours = [np.empty((0, 2))], []
    for line in lines:
        colour, marker = OUR_STYLE if line.ours else styles[line.implementation]
        size, width, layer = (6.5, 2.8, 3) if line.ours else (5.5, 1.8, 2)
        points = np.array(line.points, dtype=float)
        ax.plot(*points.T, color=colour, marker=marker, markersize=size, linewidth=width, linestyle=line.dash,
                zorder=layer)  # fmt: skip
        pixels = ax.transData.transform(points)
        steps = np.linspace(0, len(points) - 1, 40 * len(points))
        inked.append(np.stack([np.interp(steps, np.arange(len(points)), axis) for axis in pixels.T], axis=1))
        colours.append(colour)

    drawn = np.concatenate(inked)
    taken: list[Any] = []
    frame = ax.get_window_extent()
    renderer = ax.figure.canvas.get_renderer()
    # The lines that end first have the most others around their ends, so their labels choose first; ours is short, and
    # finds a place among the rest.
    by_end = sorted(zip(lines, colours, strict=True), key=lambda pair: (pair[0].points[-1][0], pair[0].ours))
    for line, colour in by_end:
        text = ax.annotate(line.label, line.points[-1], (0, 9), textcoords="offset points", ha="right", va="bottom",
                           fontsize=10, color=colour, fontweight="bold" if line.ours else "normal", zorder=4,
                           path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip

        def covered(point: tuple[float, float], place: Place, text: Any = text) -> tuple[int, int, int]:
            """What is in the way there: the frame, other labels, lines."""
            text.xy = point
            text.set(position=place[0], ha=place[1], va=place[2])
            box = text.get_window_extent(renderer).padded(4)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            return not inside, sum(map(box.overlaps, taken)), box.count_contains(drawn)

        # The best place, and of those as good the nearest to the line's end.
        places = [(point, place) for point in reversed(line.points) for place in PLACES]
        covered(*min(places, key=lambda pair: covered(*pair)))
        taken.append(text.get_window_extent(renderer))
