"""What the benchmark of the serving operations shows: one table, a few sentences, and decode as bars."""

from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_attention.bench.peers import OURS
from lightning_attention.bench.plot import FAINT, INK, OUR_STYLE, RULE, STYLES
from lightning_attention.bench.serving_peers import DECODE, PREFILL, SPECULATE
from lightning_attention.bench.tables import _table

Record = dict[str, Any]

_COLOURS = {OURS: OUR_STYLE[0], "seg_la": STYLES["sdpa"][0], "fla": STYLES["fla"][0], "vllm": "#A84F82"}


def _cases(records: list[Record]) -> dict[tuple[str, str, str], dict[str, Record]]:
    """By operation, size and type of state, every implementation's record."""
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    for r in records:
        found.setdefault((r["what"], r["size"], r["state"]), {})[r["implementation"]] = r
    return found


def _us(record: Record) -> float | None:
    return record.get("us", record["ms"] * 1e3 if "ms" in record else None)


def table(records: list[Record]) -> Table:
    """A row a case: our time and part of the copy rate, and the others' times over ours."""
    labels = {r["implementation"]: r["label"] for r in records}
    shown = _table("Serving operations (µs; part of the copy rate; others: over our time)")
    for name in ("operation", "size", "state"):
        shown.add_column(name)
    for name, label in labels.items():
        shown.add_column(label, justify="right")
        if name == OURS:
            shown.add_column("copy", justify="right")
    shown.add_column("our errors\noutput, state", justify="right")
    for (what, size, state), found in _cases(records).items():
        mine, cells = _us(found.get(OURS, {})), [what, size, state]
        for name in labels:
            record = found.get(name)
            us = None if record is None else _us(record)
            cell = "" if record is None else "failed" if us is None else f"{us:.1f}"
            if name == OURS:
                cells += [cell, f"{record['copy_fraction']:.2f}" if record and "copy_fraction" in record else ""]
            else:
                cells.append(cell if us is None or mine is None else f"{cell} ({us / mine:.2f}×)")
        own = found.get(OURS, {})
        errors = [f"{own[name]:.0e}" for name in ("output_error", "state_error") if name in own]
        shown.add_row(*cells, ", ".join(errors))
    return shown


def summary(records: list[Record]) -> list[str]:
    """The ratios that the table has in different rows, and the worst of those that it has in one."""
    cases, lines = _cases(records), []
    sizes = [(r["N"], r["size"]) for r in records if r["what"] == DECODE]
    if sizes:
        size = max(sizes)[1]
        both = [_us(cases[DECODE, size, state].get(OURS, {})) for state in ("float32", "bfloat16")
                if (DECODE, size, state) in cases]  # fmt: skip
        if len(both) == 2 and both[0] and both[1]:
            lines.append(
                f"decode, {size}: {both[0] / both[1]:.2f} times as fast on a bfloat16 state as on a float32 one"
            )
    for what, name, text in (
        (PREFILL, "seg_la", "seg_la takes"),
        (PREFILL, "forward", "our forward of the same packing takes"),
        (PREFILL, "dense", "our forward of one sequence takes"),
        (SPECULATE, "decodes", "a decode call for each draft takes"),
    ):
        ratios = [other / mine for (case, _, _), found in cases.items() if case == what
                  and (mine := _us(found.get(OURS, {}))) and (other := _us(found.get(name, {})))]  # fmt: skip
        if ratios:
            spread = " to ".join(dict.fromkeys(f"{x:.2f}" for x in (min(ratios), max(ratios))))
            lines.append(f"{what}: {text} {spread} times our time")
    return lines


def figure(records: list[Record], environment: dict[str, Any], path: Path) -> None:
    """Decode's part of the copy rate, a group of bars for each N, to ``path`` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [r for r in records if r["what"] == DECODE and "copy_fraction" in r]
    sizes = sorted({r["N"] for r in drawn})
    labels = {r["implementation"]: r["label"] for r in drawn}
    width = 0.8 / len(labels)
    whole = Figure(figsize=(12, 5.4), dpi=150, facecolor="white")
    FigureCanvasAgg(whole)
    panels = whole.subplots(1, 2, sharey=True)
    whole.subplots_adjust(left=0.065, right=0.985, top=0.82, bottom=0.19, wspace=0.05)
    whole.suptitle("Decode: part of the copy rate", x=0.065, y=0.97, ha="left", fontsize=16, fontweight="bold",
                   color=INK)  # fmt: skip
    for axes, state in zip(panels, ("float32", "bfloat16"), strict=True):
        for i, (name, label) in enumerate(labels.items()):
            found = {r["N"]: r["copy_fraction"] for r in drawn if (r["implementation"], r["state"]) == (name, state)}
            at = [sizes.index(N) + (i - (len(labels) - 1) / 2) * width for N in found]
            bars = axes.bar(at, list(found.values()), 0.92 * width, label=label, color=_COLOURS.get(name, FAINT))
            axes.bar_label(bars, fmt="%.2f", fontsize=8, color=INK, padding=2)
        axes.set_title(f"state in {state}", loc="left", fontsize=12, color=INK)
        axes.set_xticks(range(len(sizes)), [f"{N:,}" for N in sizes])
        axes.set_xlabel("sequences, one token each", color=INK)
        axes.grid(True, axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b5b5b5")
        axes.tick_params(color="#b5b5b5", labelcolor=INK)
    panels[0].set_ylabel("bytes that must move ÷ time ÷ copy rate", color=INK)
    panels[0].set_ylim(0, 1.25 * max(r["copy_fraction"] for r in drawn))  # room for the legend
    panels[0].legend(ncols=len(labels), frameon=False, labelcolor=INK, loc="upper left")
    whole.text(0.065, 0.03, _caption(drawn[0], environment), fontsize=9, color=FAINT, va="bottom", linespacing=1.5)
    whole.savefig(path)


def _caption(record: Record, environment: dict[str, Any]) -> str:
    versions = f"lightning-attention {environment['lightning_attention']}, torch {environment['torch']}"
    how = ", flushed L2, one CUDA graph a call" if environment["device_type"] == "cuda" else ""
    if environment["device_type"] == "cuda":
        versions += f", Triton {environment['triton']}"
    versions += "".join(f", {name} {version}" for name, version in environment["peers"].items() if version)
    return (
        f"q, k, v in {record['dtype']}, {record['H']} heads of {record['D']}{how}\n"
        f"{environment['device']} · {versions} · {environment['date'][:10]}"
    )
