"""Time and memory per token against sequence length: that softmax attention's grows and ours does not."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape, measure
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import ATTENTION, is_ours, ours
from lightning_attention.bench.render import Figure, Line, Panel, Table, caption, length, number
from lightning_attention.bench.report import Record, Report

EXPLANATION = (
    "Softmax attention looks back at every earlier token, so a token costs more the longer the sequence. "
    "Lightning attention keeps a state of fixed size."
)


@dataclass(frozen=True)
class Sweep:
    """Sequence lengths to go through at B·T = ``tokens`` (B = 1 where that is less than T).

    A peer is left out from the length on at which one call is expected to take more than ``limit_s``: the time at
    the length before, times the growth in tokens, and for softmax attention in T too. Ours runs at every length.
    """

    lengths: tuple[int, ...]
    H: int
    D: int
    dtype: torch.dtype
    tokens: int
    limit_s: float
    seconds: float


def doublings(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, … up to last."""
    return tuple(first << i for i in range((last // first).bit_length()))


#: On two cores the full sweep takes about four minutes and the quick one half a minute.
SCALES = {
    "cpu": Sweep(doublings(512, 65_536), 8, 64, torch.float32, tokens=1, limit_s=10, seconds=3),
    "cpu quick": Sweep(doublings(512, 16_384), 8, 64, torch.float32, tokens=1, limit_s=1, seconds=0.4),
    # 512 MB a tensor: a card with 24 GB runs it, and the smallest B·H still fills it.
    "cuda": Sweep(doublings(1024, 131_072), 16, 128, torch.bfloat16, 131_072, limit_s=1, seconds=0.5),
    "cuda quick": Sweep(doublings(1024, 32_768), 16, 128, torch.bfloat16, 32_768, limit_s=0.2, seconds=0.1),
}


def sweep(run: Run, suite: str = "lengths") -> None:
    """Forward and forward+backward of every implementation, ours first, along the sweep, into the report."""
    scale: Sweep = run.scale
    before: dict[tuple[str, str], tuple[float, Shape]] = {}
    stopped: set[tuple[str, str]] = set()
    implementations = [ours(run.backend), *run.peers]
    for T in scale.lengths:
        shape = Shape(max(1, scale.tokens // T), T, scale.H, scale.D)
        problem = Problem(shape, scale.dtype, run.device)
        for pass_ in (FORWARD, BOTH):
            row = asdict(shape) | {"dtype": str(scale.dtype).removeprefix("torch."), "pass": pass_}
            results: dict[str, dict[str, Any]] = {}
            for i in implementations:
                key = (i.name, pass_)
                expected = expected_s(*before[key], shape, i.softmax) if key in before and not is_ours(i.name) else 0.0
                if key not in stopped and expected > scale.limit_s:
                    why = f"a call would take about {expected:.3g} s, more than {scale.limit_s:g} s"
                    results[i.name] = {"skipped": why}
            able = [i for i in implementations if (i.name, pass_) not in stopped and i.name not in results]
            results |= measure(able, problem, pass_, seconds=scale.seconds)
            for i in implementations:
                if i.name not in results:
                    continue
                result = results[i.name]
                run.report.add(suite, **row, implementation=i.name, label=i.label, **result)
                run.say(f"T {T:>9,}  {pass_:<16}  {i.name:<20} {_line(result)}")
                if "ms" in result:
                    before[i.name, pass_] = result["ms"], shape
                else:
                    stopped.add((i.name, pass_))
        del problem


def _line(result: dict[str, Any]) -> str:
    if "ms" not in result:
        return f"skipped: {result['skipped']}" if "skipped" in result else str(result["error"])
    per_token = f"{result['us_per_token']:>9.4f} µs/token  {result['bytes_per_token']:>9,.0f} bytes/token"
    return f"{result['ms']:>10.3f} ms  {per_token}"


def expected_s(ms: float, shape: Shape, next_shape: Shape, softmax: bool) -> float:
    """Seconds that a call is expected to take, by the milliseconds that one of another shape took."""
    growth = next_shape.B * next_shape.T / (shape.B * shape.T)
    return ms * 1e-3 * growth * (next_shape.T / shape.T if softmax else 1)


def labels(records: list[Record]) -> dict[str, str]:
    """Every implementation's name and label, in the order they were measured."""
    return {r["implementation"]: r["label"] for r in records}


def tables(records: list[Record]) -> Iterator[Table]:
    """Time and memory per token against T, a table for each pass; peers with how many times faster ours is."""
    for pass_ in (FORWARD, BOTH):
        columns = ["T"]
        for name, label in labels(records).items():
            columns += [f"{label}\nµs", "bytes", *([] if is_ours(name) else ["ours\nfaster"])]
        chosen = [r for r in records if r["pass"] == pass_]
        rows = []
        for T in sorted({r["T"] for r in chosen}):
            found = {r["implementation"]: r for r in chosen if r["T"] == T}
            mine = next((r["ms"] for name, r in found.items() if is_ours(name) and "ms" in r), None)
            rows.append([f"{T:,}"])
            for name in labels(records):
                record = found.get(name, {})
                measured = "ms" in record
                rows[-1] += [number(record["us_per_token"]), number(record["bytes_per_token"])] if measured else [
                    "failed" if "error" in record else "–", ""]  # fmt: skip
                if not is_ours(name):
                    rows[-1].append(f"{record['ms'] / mine:.1f}×" if mine and measured else "")
        yield Table(f"{pass_}, per token", columns, rows, words=0)


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


def time_per_token(records: list[Record], environment: dict[str, Any]) -> Figure:
    """Time per token against T, forward and forward+backward side by side."""
    drawn = [r for r in records if "ms" in r]
    panels = []
    for pass_ in (FORWARD, BOTH):
        found: dict[str, list[Record]] = {}
        for r in sorted((r for r in drawn if r["pass"] == pass_), key=lambda r: r["T"]):
            found.setdefault(r["implementation"], []).append(r)
        mine = {r["T"]: r["us_per_token"] for name, line in found.items() if is_ours(name) for r in line}
        lines = [
            Line(name, _label(line[-1], mine), [(r["T"], r["us_per_token"]) for r in line], is_ours(name))
            for name, line in sorted(found.items(), key=lambda item: not is_ours(item[0]))
        ]
        title = pass_.replace("+", " + ")
        panels.append(Panel(title, "sequence length T (tokens)", "µs per token, all heads", lines))
    tokens = {r["B"] * r["T"] for r in records}
    batch = f"B·T = {tokens.pop():,}" if len(tokens) == 1 else "one sequence" if records[-1]["B"] == 1 else "batched"
    text = caption(environment, f"{records[0]['dtype']}, {records[0]['H']} heads of {records[0]['D']}, {batch}")
    skipped = next((r["skipped"] for r in records if "skipped" in r), None)
    if skipped is not None:
        text += f"\nA line ends where the next call would take more than {skipped.rpartition('more than ')[2]}."
    softmax = any(r["implementation"].startswith("sdpa") for r in records)
    return Figure("Time per token against sequence length", panels, text, EXPLANATION if softmax else "")


def _label(last: Record, mine: dict[int, float]) -> str:
    """The name of the line that ends there, and for a peer how its time compares with ours."""
    if is_ours(last["implementation"]) or last["T"] not in mine:
        return str(last["label"])
    ratio = last["us_per_token"] / mine[last["T"]]
    times = f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
    return f"{last['label']}\n{times} our time at {length(last['T'])}"


def show(report: Report, suite: str = "lengths") -> Iterator[Shown]:
    """The tables, how constant our time per token is, and the figure."""
    records = report.find(suite)
    if records:
        yield from tables(records)
    if any("ms" in r for r in records):
        yield from constant(records)
        yield time_per_token(records, report.environment)


CASE = Case(sweep, show, SCALES, operations=(ATTENTION,), peers=("sdpa",), backends=True)
