"""The records of a benchmark, and the rows of a check, as tables to read in a terminal."""

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from lightning_attention.bench.check import Row
from lightning_attention.bench.op import BACKWARD, BOTH, FORWARD, Shape
from lightning_attention.bench.peers import OURS
from lightning_attention.bench.report import Report

Record = dict[str, Any]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def check_table(rows: Iterable[Row], several_devices: bool) -> Table:
    """One line a row, failures in red with the reason in place of the numbers."""
    table = _table("Relative Frobenius error against float64")
    for name in ("backend", "dtype", "what", "worst"):
        table.add_column(name)
    table.columns[-1].no_wrap = True
    for name in ("error", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ok")
    for row in rows:
        backend = f"{row.backend} ({row.device})" if several_devices else row.backend
        dtype = str(row.dtype).removeprefix("torch.")
        cells = (row.worst, f"{row.error:.1e}", f"{row.budget:.1e}")
        if row.failure is not None:
            cells = (escape(row.failure), "–", "–")
        table.add_row(backend, dtype, row.what, *cells, "yes" if row.ok else "NO", style=None if row.ok else "red")
    return table


def _by_name(records: Iterable[Record]) -> dict[str, Record]:
    return {r["implementation"]: r for r in records}


def _labels(records: list[Record]) -> dict[str, str]:
    """Every implementation's name and label, in the order they were measured."""
    return {r["implementation"]: r["label"] for r in records}


def is_ours(name: str) -> bool:
    return name.partition(":")[0] == OURS


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def lengths_tables(records: list[Record]) -> list[Table]:
    """Time and memory per token against T, a table for each pass; peers with how many times faster ours is."""
    labels = _labels(records)
    tables = []
    for pass_ in (FORWARD, BOTH):
        table = _table(f"{pass_}, per token")
        table.add_column("T", justify="right")
        for name, label in labels.items():
            table.add_column(f"{label}\nµs", justify="right")
            table.add_column("bytes", justify="right")
            if not is_ours(name):
                table.add_column("ours\nfaster", justify="right")
        chosen = [r for r in records if r["pass"] == pass_]
        for T in sorted({r["T"] for r in chosen}):
            found = _by_name(r for r in chosen if r["T"] == T)
            ours = next((r["ms"] for name, r in found.items() if is_ours(name) and "ms" in r), None)
            cells = [f"{T:,}"]
            for name in labels:
                record = found.get(name, {})
                if "ms" in record:
                    cells += [_number(record["us_per_token"]), _number(record["bytes_per_token"])]
                else:
                    cells += ["failed" if "error" in record else "–", ""]
                if not is_ours(name):
                    cells.append(f"{record['ms'] / ours:.1f}×" if ours and "ms" in record else "")
            table.add_row(*cells)
        tables.append(table)
    return tables


def spread(records: list[Record], pass_: str, first: int) -> float | None:
    """How much more a token costs us at the slowest length than at the fastest, from T = ``first`` on."""
    times = [r["us_per_token"] for r in records
             if is_ours(r["implementation"]) and r["pass"] == pass_ and r["T"] >= first and "ms" in r]  # fmt: skip
    return max(times) / min(times) - 1 if len(times) > 1 else None


def constant(records: list[Record]) -> list[str]:
    """A sentence a pass: within what our time per token stays once the sequence is long."""
    # Below these a call is too short for the device: two cores want 4,096 tokens, a large GPU 8,192.
    first = 4096 if records[0]["dtype"] == "float32" else 8192
    last = max(r["T"] for r in records)
    found = ((pass_, spread(records, pass_, first)) for pass_ in (FORWARD, BOTH))
    return [f"{pass_}: our time per token from T = {first:,} to {last:,} varies by {value:.0%}"
            for pass_, value in found if value is not None]  # fmt: skip


def shapes_table(records: list[Record], errors: list[Record]) -> Table:
    """Ours with the part of the floor it reaches, and each peer's time with how many times slower it is."""
    labels = _labels(records)
    table = _table("ms (part of the memory floor; peers: times slower than ours)")
    table.add_column("B, T, H, D")
    for name, label in labels.items():
        for pass_ in (FORWARD, BACKWARD, BOTH) if is_ours(name) else (FORWARD, BOTH):
            short = {FORWARD: "f", BACKWARD: "b", BOTH: "f+b"}[pass_]
            table.add_column(f"{'ours' if is_ours(name) else label}\n{short}", justify="right")
    table.add_column("memory", justify="right")
    for name in dict.fromkeys(e["implementation"] for e in errors):
        table.add_column(f"worst error\n{'ours' if is_ours(name) else name}", justify="right")

    def key(record: Record) -> Shape:
        return Shape(*(record[x] for x in "BTHD"))

    for shape in dict.fromkeys(map(key, records)):
        mine = [r for r in records if key(r) == shape]
        found = {(r["implementation"], r["pass"]): r for r in mine}
        cells, memory = [str(shape)], ""
        for name in labels:
            for pass_ in (FORWARD, BACKWARD, BOTH) if is_ours(name) else (FORWARD, BOTH):
                record = found.get((name, pass_), {})
                if "ms" not in record:
                    cells.append("failed" if "error" in record else "–")
                elif is_ours(name):
                    cells.append(f"{record['ms']:.3f} ({record['floor_fraction']:.2f})")
                    memory = f"{record['memory_ratio']:.3f}" if pass_ == BOTH else memory
                else:
                    ours = next((r["ms"] for r in mine if is_ours(r["implementation"]) and r["pass"] == pass_
                                 and "ms" in r), float("nan"))  # fmt: skip
                    cells.append(f"{record['ms']:.3f} ({record['ms'] / ours:.1f}×)")
        cells.append(memory)
        for name in dict.fromkeys(e["implementation"] for e in errors):
            mine_errors = [e for e in errors if e["implementation"] == name and key(e) == shape]
            cells.append(_worst(mine_errors[0]) if mine_errors else "")
        table.add_row(*cells)
    return table


def _worst(errors: Record) -> str:
    values = [errors[x] for x in ("output", "dq", "dk", "dv") if x in errors]
    if not values:
        return "failed"
    return next((x for x in values if isinstance(x, str)), None) or f"{max(values):.1e}"


def packed_table(records: list[Record]) -> Table:
    """Packed batches, and their time over that of one dense sequence of as many tokens."""
    table = _table("Packed batches (ms; over one dense sequence of as many tokens)")
    table.add_column("H", justify="right")
    table.add_column("batch")
    for pass_ in (FORWARD, BOTH):
        table.add_column(pass_, justify="right")
    for H, packing in dict.fromkeys((r["H"], r["packing"]) for r in records):
        cells = [str(H), packing]
        for pass_ in (FORWARD, BOTH):
            same = [r for r in records if r["H"] == H and r["pass"] == pass_]
            ms = next(r["ms"] for r in same if r["packing"] == packing)
            cells.append(f"{ms:.4f} ({ms / same[0]['ms']:.2f})")
        table.add_row(*cells)
    return table


def host_table(records: list[Record]) -> Table:
    """Microseconds of the calling thread."""
    table = _table("CPU time of an eager call (µs)")
    table.add_column("")
    for pass_ in (FORWARD, BOTH):
        table.add_column(pass_, justify="right")
    for name, label in _labels(records).items():
        found = {r["pass"]: r for r in records if r["implementation"] == name}
        cells = [f"{found[p]['us']:.1f}" if "us" in found.get(p, {}) else "failed" for p in (FORWARD, BOTH)]
        table.add_row(label, *cells)
    return table


def of_suite(suite: str, records: list[Record], report: Report) -> list[Table]:
    """The tables of a suite's records."""
    if suite in ("lengths", "constancy"):
        return lengths_tables(records)
    if suite == "shapes":
        return [shapes_table(records, report.find("errors"))]
    return [{"packed": packed_table, "host": host_table}[suite](records)]
