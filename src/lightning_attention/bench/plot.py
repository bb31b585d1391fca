"""The figure: time per token against the sequence length, forward and forward+backward side by side."""

from pathlib import Path
from typing import Any

from lightning_attention.bench.op import BOTH, FORWARD
from lightning_attention.bench.tables import is_ours

Record = dict[str, Any]

# Okabe and Ito's hues, which stay apart for colour-blind readers, two of them darkened so that text in them has
# contrast enough; the markers differ too, for print without colour.
STYLES = {
    "fla": ("#009E73", "s"),
    "lightning_attn": ("#A84F82", "^"),
    "sdpa": ("#D55E00", "D"),
    "sdpa_cudnn": ("#D55E00", "D"),
    "sdpa_flash": ("#B07800", "v"),
}
OUR_STYLE = ("#0072B2", "o")
EXPLANATION = (
    "Softmax attention looks back at every earlier token, so a token costs more the longer the sequence. "
    "Lightning attention keeps a state of fixed size."
)
INK, FAINT, RULE = "#222222", "#6b6b6b", "#e4e4e4"

#: Where a label may sit from a point of its line: offset in points, horizontal and vertical alignment.
PLACES = (
    ((11, 0), "left", "center"),
    ((0, 9), "right", "bottom"),
    ((-9, 4), "right", "bottom"),
    ((0, 9), "center", "bottom"),
    ((0, -9), "right", "top"),
    ((0, -9), "center", "top"),
)


def _length(T: float) -> str:
    return f"{T:g}" if T < 1024 else f"{T / 1024:g}k" if T < 1 << 20 else f"{T / (1 << 20):g}M"


def _lines(records: list[Record], pass_: str) -> dict[str, list[Record]]:
    """Every implementation's measured records of a pass, by length; ours first."""
    lines: dict[str, list[Record]] = {}
    for r in records:
        if r["pass"] == pass_ and "ms" in r:
            lines.setdefault(r["implementation"], []).append(r)
    lines = {name: sorted(line, key=lambda r: r["T"]) for name, line in lines.items()}
    return dict(sorted(lines.items(), key=lambda item: not is_ours(item[0])))


def by_length(shapes: list[Record]) -> list[Record]:
    """Of the shapes of training what one figure can show: H and D of the first, and of each T the largest batch."""
    measured = [r for r in shapes if "ms" in r]
    alike = [r for r in measured if (r["H"], r["D"]) == (measured[0]["H"], measured[0]["D"])]
    largest = {r["T"]: max(x["B"] for x in alike if x["T"] == r["T"]) for r in alike}
    return [r for r in alike if r["B"] == largest[r["T"]]]


def _label(line: list[Record], ours: dict[int, float]) -> str:
    """The line's name, and for a peer how our time compares where its line ends."""
    last = line[-1]
    if is_ours(last["implementation"]) or last["T"] not in ours:
        return last["label"]
    ratio = last["us_per_token"] / ours[last["T"]]
    times = f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
    return f"{last['label']}\n{times} our time at {_length(last['T'])}"


def time_per_token(records: list[Record], environment: dict[str, Any], path: Path) -> None:
    """Draws the records of a suite that goes through lengths to ``path`` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(12, 6.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    figure.subplots_adjust(left=0.065, right=0.985, top=0.8, bottom=0.19, wspace=0.05)
    figure.suptitle("Time per token against sequence length", x=0.065, y=0.97, ha="left", fontsize=16,
                    fontweight="bold", color=INK)  # fmt: skip
    if any(r["implementation"].startswith("sdpa") for r in records):
        figure.text(0.065, 0.885, EXPLANATION, fontsize=10.5, color=FAINT)
    figure.text(0.065, 0.025, _caption(records, environment), fontsize=9, color=FAINT, va="bottom", linespacing=1.5)

    lengths = sorted({r["T"] for r in records})
    times = [r["us_per_token"] for r in records if "ms" in r]
    axes[0].set(xscale="log", yscale="log", xlim=(lengths[0] / 1.3, lengths[-1] * 1.3),
                ylim=(min(times) / 1.5, max(times) * 2.5))  # fmt: skip
    axes[0].set_xticks(lengths[:: 2 if len(lengths) > 8 else 1])
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda T, _: _length(T)))
    axes[0].xaxis.set_minor_locator(NullLocator())
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("µs per token, all heads", color=INK)
    for ax, pass_ in zip(axes, (FORWARD, BOTH), strict=True):
        ax.set_title(pass_.replace("+", " + "), loc="left", fontsize=12, color=INK)
        ax.set_xlabel("sequence length T (tokens)", color=INK)
        ax.grid(True, color=RULE, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#b5b5b5")
        ax.tick_params(color="#b5b5b5", labelcolor=INK)
        _draw(ax, _lines(records, pass_))
    figure.savefig(path)


def _draw(ax: Any, lines: dict[str, list[Record]]) -> None:
    """The lines, then a label beside each in its colour."""
    import numpy as np
    from matplotlib.patheffects import withStroke

    ours = {r["T"]: r["us_per_token"] for name, line in lines.items() if is_ours(name) for r in line}
    inked, colours = [], {}
    for name, line in lines.items():
        colour, marker = OUR_STYLE if is_ours(name) else STYLES.get(name, (FAINT, "x"))
        mine = is_ours(name)
        points = np.array([(r["T"], r["us_per_token"]) for r in line], dtype=float)
        ax.plot(*points.T, color=colour, marker=marker, markersize=6.5 if mine else 5.5,
                linewidth=2.8 if mine else 1.8, zorder=3 if mine else 2)  # fmt: skip
        pixels = ax.transData.transform(points)
        steps = np.linspace(0, len(line) - 1, 40 * len(line))
        inked.append(np.stack([np.interp(steps, np.arange(len(line)), axis) for axis in pixels.T], axis=1))
        colours[name] = colour

    drawn = np.concatenate([np.empty((0, 2)), *inked])
    taken: list[Any] = []
    frame = ax.get_window_extent()
    renderer = ax.figure.canvas.get_renderer()
    # The lines that end first have the most others around their ends, so their labels choose first.
    for name, line in sorted(lines.items(), key=lambda item: item[1][-1]["T"]):
        text = ax.annotate(_label(line, ours), (line[-1]["T"], line[-1]["us_per_token"]), (0, 9),
                           textcoords="offset points", ha="right", va="bottom", fontsize=10, color=colours[name],
                           fontweight="bold" if is_ours(name) else "normal", zorder=4,
                           path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip
        # From the line's end back: the first place that covers no line and no other label. Else it stays at the end.
        for record, (offset, ha, va) in ((r, place) for r in reversed(line) for place in PLACES):
            text.xy = (record["T"], record["us_per_token"])
            text.set(position=offset, ha=ha, va=va)
            box = text.get_window_extent(renderer).padded(4)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not box.count_contains(drawn) and not any(map(box.overlaps, taken)):
                break
        else:
            text.xy = (line[-1]["T"], line[-1]["us_per_token"])
            text.set(position=(0, 9), ha="right", va="bottom")
        taken.append(text.get_window_extent(renderer))


def _caption(records: list[Record], environment: dict[str, Any]) -> str:
    first = records[0]
    tokens = {r["B"] * r["T"] for r in records}
    batch = f"B·T = {tokens.pop():,}" if len(tokens) == 1 else "one sequence" if records[-1]["B"] == 1 else "batched"
    versions = f"lightning-attention {environment['lightning_attention']}, torch {environment['torch']}"
    if environment["device_type"] == "cuda":
        versions += f", Triton {environment['triton']}"
    versions += "".join(f", {name} {version}" for name, version in environment["peers"].items() if version)
    setting = f"{environment['device']} · {first['dtype']}, {first['H']} heads of {first['D']}, {batch}"
    text = f"{setting} · {versions} · {environment['date'][:10]}"
    if any("skipped" in r for r in records):
        text += f"\nA line ends where {_limit(records)}."
    return text


def _limit(records: list[Record]) -> str:
    limit = next(r["skipped"] for r in records if "skipped" in r).rpartition("more than ")[2]
    return f"the next call would take more than {limit}"
