"""What the serving benchmark shows: a table, what stays constant, and a figure."""

from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_attention.bench.plot import FAINT, INK, OUR_STYLE, RULE, STYLES
from lightning_attention.bench.serving import LABELS, OURS, SOFTMAX

Record = dict[str, Any]

_STYLE = {OURS: OUR_STYLE, SOFTMAX: STYLES["sdpa"]}


def _length(T: float) -> str:
    return f"{T:g}" if T < 1024 else f"{T / 1024:g}k" if T < 1 << 20 else f"{T / (1 << 20):g}M"


def table(records: list[Record]) -> Table:
    """One row a batch size and context, both models beside each other."""
    found = Table(title="generation, decode steps", title_justify="left")
    found.add_column("batch", justify="right")
    found.add_column("context", justify="right")
    for name in (OURS, SOFTMAX):
        for column in ("ms", "tokens/s", "keeps"):
            found.add_column(f"{LABELS[name]}\n{column}", justify="right")
    for pair in sorted({(r["B"], r["context"]) for r in records}):
        cells = []
        for name in (OURS, SOFTMAX):
            record = next((r for r in records if (r["B"], r["context"]) == pair and r["implementation"] == name), {})
            if "ms" in record:
                kept = f"{record['state_bytes'] / 1e6:,.1f} MB"
                cells += [f"{record['ms']:.3f}", f"{record['tokens_per_second']:,.0f}", kept]
            else:
                cells += ["", "", "no room" if "skipped" in record else ""]
        found.add_row(str(pair[0]), _length(pair[1]), *cells)
    return found


def constant(records: list[Record]) -> list[str]:
    """For every batch size that we ran at several contexts: how time and memory changed between them."""
    ours = [r for r in records if r["implementation"] == OURS]
    lines = []
    for B in sorted({r["B"] for r in ours}):
        found = sorted((r for r in ours if r["B"] == B), key=lambda r: r["context"])
        if len(found) < 2:
            continue
        first, last = found[0], found[-1]
        line = (
            f"batch {B}: a step takes {first['ms']:.3f} ms at context {_length(first['context'])} and "
            f"{last['ms']:.3f} ms at {_length(last['context'])} ({last['ms'] / first['ms'] - 1:+.1%}); "
            f"over all contexts the time differs by {_spread(found, 'ms'):.1%}"
        )
        if "peak_bytes" in first:
            line += f", the peak of memory by {_spread(found, 'peak_bytes'):.1%}"
        lines.append(line)
    return lines


def _spread(records: list[Record], what: str) -> float:
    values = [r[what] for r in records]
    return max(values) / min(values) - 1


def figure(records: list[Record], environment: dict[str, Any], path: Path) -> None:
    """Tokens per second against the batch size, and time of a step against the context, to ``path`` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    drawn = [r for r in records if "ms" in r]
    shortest = min(r["context"] for r in drawn)
    sizes = sorted({r["B"] for r in drawn if r["context"] != shortest})
    whole = Figure(figsize=(12, 6.2), dpi=150, facecolor="white")
    FigureCanvasAgg(whole)
    left, right = whole.subplots(1, 2)
    whole.subplots_adjust(left=0.075, right=0.985, top=0.84, bottom=0.19, wspace=0.18)
    whole.suptitle(
        "Generation against batch size and context",
        x=0.075,
        y=0.97,
        ha="left",
        fontsize=16,
        fontweight="bold",
        color=INK,
    )
    for name in (OURS, SOFTMAX):
        colour, marker = _STYLE[name]
        how = {"color": colour, "marker": marker, "markersize": 6}
        mine = sorted((r for r in drawn if r["implementation"] == name), key=lambda r: (r["B"], r["context"]))
        batch = [(r["B"], r["tokens_per_second"]) for r in mine if r["context"] == shortest]
        left.plot(*zip(*batch, strict=True), label=LABELS[name], linewidth=2.2, **how)
        for B, dash in zip(sizes, ("-", "--", ":"), strict=False):
            steps = [(r["context"], r["ms"]) for r in mine if r["B"] == B]
            right.plot(
                *zip(*steps, strict=True), label=f"{LABELS[name]}, batch {B}", linewidth=2, linestyle=dash, **how
            )
    left.set(xscale="log", yscale="log", xlabel="batch size", ylabel="tokens per second, the whole batch")
    left.set_title(f"context {_length(shortest)}", loc="left", fontsize=12, color=INK)
    left.set_xticks(sorted({r["B"] for r in drawn if r["context"] == shortest}))
    right.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="ms for one step")
    steps_ms = [r["ms"] for r in drawn if r["B"] in sizes]
    right.set_ylim(0.6 * min(steps_ms), 3 * max(steps_ms))  # room for the legend
    right.set_title("one token for every sequence", loc="left", fontsize=12, color=INK)
    right.set_xticks(sorted({r["context"] for r in drawn if r["B"] in sizes}))
    right.xaxis.set_major_formatter(FuncFormatter(lambda T, _: _length(T)))
    left.xaxis.set_major_formatter(FuncFormatter(lambda B, _: f"{B:g}"))
    for axes in (left, right):
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(True, color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(color="#b5b5b5", labelcolor=INK)
        axes.legend(frameon=False, labelcolor=INK, handlelength=4)
    whole.text(0.075, 0.025, _caption(drawn, environment), fontsize=9, color=FAINT, va="bottom", linespacing=1.5)
    whole.savefig(path)


def _caption(records: list[Record], environment: dict[str, Any]) -> str:
    weights = " and ".join({f"{r['label']} {r['parameters'] / 1e6:.0f}M": None for r in records})
    graphs = ", CUDA graphs" if environment["device_type"] == "cuda" else ""
    versions = ", ".join(
        f"{name.replace('_', '-')} {environment[name]}" for name in ("lightning_attention", "torch", "transformers")
    )
    return (
        f"{weights} random weights, {records[0]['dtype']}{graphs}. "
        "TransNormerLLM with all its scheduling; softmax on a full static cache with none.\n"
        f"{environment['device']} · {versions} · {environment['date'][:10]}"
    )
