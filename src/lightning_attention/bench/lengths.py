"""Time and memory per token against sequence length: softmax attention's time grows, ours does not."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape, measure
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import ATTENTION, is_ours, ours
from lightning_attention.bench.render import Figure, Panel, Table, caption, length, lines, number, pivot
from lightning_attention.bench.report import Record, Report

EXPLANATION = (
    "Softmax attention looks back at every earlier token, so a token costs more the longer the sequence. "
    "Lightning attention keeps a state of fixed size."
)


@dataclass(frozen=True)
class Sweep:
    """Sequence lengths to go through at B·T = ``tokens`` (B = 1 where that is less than T).

    A peer is left out from the first length on at which one call is expected to take more than ``limit_s``: the time at
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
    for T in scale.lengths:
        shape = Shape(max(1, scale.tokens // T), T, scale.H, scale.D)
        problem = Problem(shape, scale.dtype, run.device)
        for pass_ in (FORWARD, BOTH):
            going = [i for i in [ours(run.backend), *run.peers] if (i.name, pass_) not in stopped]
            results: dict[str, dict[str, Any]] = {}
            for i in going:
                if (i.name, pass_) in before and not is_ours(i.name):
                    s = expected_s(*before[i.name, pass_], shape, i.softmax)
                    if s > scale.limit_s:
                        why = f"a call would take about {s:.3g} s, more than {scale.limit_s:g} s"
                        results[i.name] = {"skipped": why}
            able = [i for i in going if i.name not in results]
            results |= measure(able, problem, pass_, seconds=scale.seconds)
            for i in going:
                result = results[i.name]
                run.add(suite, i, **problem.sizes, **{"pass": pass_}, **result)
                if "ms" in result:
                    before[i.name, pass_] = result["ms"], shape
                else:
                    stopped.add((i.name, pass_))
        del problem  # before the next one is made


def expected_s(ms: float, shape: Shape, next_shape: Shape, softmax: bool) -> float:
    """Seconds that a call is expected to take, from the milliseconds of a call of another shape."""
    growth = next_shape.B * next_shape.T / (shape.B * shape.T)
    return ms * 1e-3 * growth * (next_shape.T / shape.T if softmax else 1)


def tables(records: list[Record]) -> Iterator[Table]:
    """Time and memory per token against T, a table for each pass; peers with how many times faster ours is."""
    mine = {(r["T"], r["pass"]): r["ms"] for r in records if is_ours(r["implementation"]) and "ms" in r}

    def cells(r: Record) -> dict[str, str]:
        head, ours_ms = f"{r['label']}\nµs", mine.get((r["T"], r["pass"]))
        if "ms" not in r:
            return {head: "failed" if "error" in r else "–"}
        found = {head: number(r["us_per_token"]), f"{r['label']}\nbytes": number(r["bytes_per_token"])}
        if not is_ours(r["implementation"]) and ours_ms:
            found[f"{r['label']}\nours faster"] = f"{r['ms'] / ours_ms:.1f}×"
        return found

    for pass_ in (FORWARD, BOTH):
        chosen = sorted((r for r in records if r["pass"] == pass_), key=lambda r: r["T"])
        yield from pivot(f"{pass_}, per token", {"T": "T"}, chosen, cells, words=0)


def spread(records: list[Record], pass_: str, first: int) -> float | None:
    """How much more a token costs us at the slowest length than at the fastest, from T = ``first`` on."""
    times = [r["us_per_token"] for r in records
             if is_ours(r["implementation"]) and r["pass"] == pass_ and r["T"] >= first and "ms" in r]  # fmt: skip
    return max(times) / min(times) - 1 if len(times) > 1 else None


def constant(records: list[Record]) -> list[str]:
    """A sentence for each pass: within which range our time per token stays for long sequences."""
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
        chosen = [r for r in drawn if r["pass"] == pass_]
        mine = {r["T"]: r["us_per_token"] for r in chosen if is_ours(r["implementation"])}
        found = lines(chosen, "T", "us_per_token", partial(_label, mine))
        title = pass_.replace("+", " + ")
        panels.append(Panel(title, "sequence length T (tokens)", "µs per token, all heads", found))
    tokens = {r["B"] * r["T"] for r in records}
    batch = f"B·T = {tokens.pop():,}" if len(tokens) == 1 else "one sequence" if records[-1]["B"] == 1 else "batched"
    text = caption(environment, f"{records[0]['dtype']}, {records[0]['H']} heads of {records[0]['D']}, {batch}")
    limits = [limit for r in records if (limit := r.get("skipped", "").partition("more than ")[2])]
    if limits:
        text += f"\nA line ends where the next call would take more than {limits[0]}."
    softmax = any(r["implementation"].startswith("sdpa") for r in records)
    return Figure("Time per token against sequence length", panels, text, EXPLANATION if softmax else "")


def _label(mine: dict[int, float], last: Record) -> str:
    """The name of the line, and for a peer how its time compares with ours."""
    if is_ours(last["implementation"]) or last["T"] not in mine:
        return str(last["label"])
    ratio = last["us_per_token"] / mine[last["T"]]
    times = f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
    return f"{last['label']}\n{times} our time at {length(last['T'])}"


def show(report: Report, suite: str = "lengths") -> Iterator[Shown]:
    """The tables, how constant our time per token is, and the figure."""
    records = report.find(suite)
    yield from tables(records)
    if any("ms" in r for r in records):
        yield from constant(records)
        yield time_per_token(records, report.environment)


CASE = Case(sweep, show, SCALES, operations=(ATTENTION,), peers=("sdpa",), backends=True)
