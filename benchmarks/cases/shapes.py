"""Shapes of training: time, part of the memory floor, peak memory, and errors against float64."""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness.errors import COMPARED, errors, mark, reference
from benchmarks.harness.timing import copy_rate
from lightning_attention.bench.attention import BACKWARD, BOTH, FORWARD, Problem, Shape, measure, result_or_error
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.lengths import time_per_token
from lightning_attention.bench.peers import ATTENTION, is_ours, ours
from lightning_attention.bench.render import Table, pivot
from lightning_attention.bench.report import Record, Report

#: Tensors of B·T·H·D numbers that must be read or written: q k v o; q k v do dq dk dv.
FLOOR_UNITS = {FORWARD: 4, BACKWARD: 7, BOTH: 11}

#: Softmax attention takes seconds a call past this length, and says nothing new.
SOFTMAX_MAX_LENGTH = 65_536


class Scale(NamedTuple):
    """The shapes, and how long each call is timed."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    seconds: float


SHAPES = ((4, 32_768, 32, 128), (4, 8_192, 32, 128), (1, 131_072, 32, 128), (1, 131_072, 8, 128), (1, 524_288, 16, 64),
          (4, 2_048, 32, 128), (1, 2_048, 32, 128))  # fmt: skip
SCALES = {
    "cuda": Scale(tuple(Shape(*x) for x in SHAPES), torch.bfloat16, 0.4),
    "cpu": Scale((Shape(4, 512, 4, 64), Shape(1, 2048, 4, 64)), torch.float32, 0.2),
}


def unit_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of one tensor of the shape."""
    return math.prod(shape) * dtype.itemsize


def floor_ms(shape: Shape, pass_: str, dtype: torch.dtype, bytes_per_second: float) -> float:
    """Milliseconds to move what the definition reads and writes, once, at the given rate."""
    return FLOOR_UNITS[pass_] * unit_bytes(shape, dtype) / bytes_per_second * 1e3


def measure_shapes(run: Run) -> None:
    """Each shape: forward, backward and both; the part of the floor reached; errors against float64 in the same run.

    A peer whose error is large stays in the table, with its times, and is called wrong there.

    ``floor_fraction`` is the time to move what the definition reads and writes at the copy rate of this process,
    divided by the time taken. ``memory_ratio`` is the peak of forward+backward, inputs and output gradient
    included, over the eight tensors q, k, v, o, do, dq, dk, dv.
    """
    scale, own = run.scale, ours(run.backend)
    rate = copy_rate(run.device)
    run.add("copy", bytes_per_second=rate)
    for shape in scale.shapes:
        problem = Problem(shape, scale.dtype, run.device)
        able = [i for i in [own, *run.peers] if not (i.softmax and shape.T > SOFTMAX_MAX_LENGTH)]
        wanted = reference(problem)
        for i in (i for i in able if not i.softmax):
            run.add("errors", i, **problem.sizes, **result_or_error(partial(errors, problem, i, wanted)))
        del wanted
        for pass_ in (FORWARD, BACKWARD, BOTH):
            chosen = [own] if pass_ == BACKWARD else able
            for i, result in zip(chosen, measure(chosen, problem, pass_, seconds=scale.seconds).values(), strict=True):
                if "ms" in result:
                    result["floor_fraction"] = floor_ms(shape, pass_, scale.dtype, rate) / result["ms"]
                    if pass_ == BOTH:
                        unit = unit_bytes(shape, scale.dtype)
                        result["memory_ratio"] = (result["peak_bytes"] + 4 * unit) / (8 * unit)
                run.add("shapes", i, **problem.sizes, **{"pass": pass_}, **result)
        del problem


def _shape(record: Record) -> Shape:
    return Shape(*(record[x] for x in "BTHD"))


def table(records: list[Record], found_errors: list[Record]) -> Iterator[Table]:
    """One: ours with the part of the floor it reaches, and each peer's time with how many times slower it is."""
    short = {FORWARD: "f", BACKWARD: "b", BOTH: "f+b"}
    mine = {(_shape(r), r["pass"]): r for r in records if is_ours(r["implementation"]) and "ms" in r}

    def cells(r: Record) -> dict[str, str]:
        ours_, name = is_ours(r["implementation"]), r["implementation"]
        if "pass" not in r:
            return {f"worst error\n{'ours' if ours_ else name}": _worst(r)}
        head = f"{'ours' if ours_ else r['label']}\n{short[r['pass']]}"
        if "ms" not in r:
            return {head: "–" if "skipped" in r else "failed"}
        if not ours_:
            own = mine.get((_shape(r), r["pass"]), {}).get("ms", float("nan"))
            return {head: f"{r['ms']:.3f} ({r['ms'] / own:.1f}×)"}
        found = {head: f"{r['ms']:.3f} ({r['floor_fraction']:.2f})"}
        return found | ({"memory": f"{r['memory_ratio']:.3f}"} if r["pass"] == BOTH else {})

    peers = [r["implementation"] for r in records]
    by_peer = sorted(records, key=lambda r: peers.index(r["implementation"]))
    title = "ms (part of the memory floor; peers: times slower than ours)"
    return pivot(title, {"B, T, H, D": lambda r: ", ".join(map(str, _shape(r)))}, [*by_peer, *found_errors], cells)


def _worst(found: Record) -> str:
    values = [found[x] for x in COMPARED if x in found]
    if not values:
        return "failed"
    worst = next((x for x in values if isinstance(x, str)), None) or max(values)
    return (worst if isinstance(worst, str) else f"{worst:.1e}") + mark(worst)


def by_length(records: list[Record]) -> list[Record]:
    """What one figure can show: H and D of the first shape, and of each T the largest batch."""
    measured = [r for r in records if "ms" in r]
    alike = [r for r in measured if (r["H"], r["D"]) == (measured[0]["H"], measured[0]["D"])]
    largest = {r["T"]: max(x["B"] for x in alike if x["T"] == r["T"]) for r in alike}
    return [r for r in alike if r["B"] == largest[r["T"]]]


def marked(records: list[Record], found_errors: list[Record]) -> list[Record]:
    """With labels that say so of those who compute wrong numbers in a record's pass."""
    wrong = {
        (r["implementation"], pass_)
        for r in found_errors
        for pass_, compared in ((FORWARD, COMPARED[:1]), (BOTH, COMPARED))
        if any(mark(r[x]) for x in compared if x in r)
    }
    return [r | {"label": f"{r['label']}, wrong"} if (r["implementation"], r["pass"]) in wrong else r for r in records]


def show(report: Report) -> Iterator[Shown]:
    """The table, and the time per token of the largest batch of each T."""
    records, found_errors = report.find("shapes"), report.find("errors")
    yield from table(records, found_errors)
    if drawn := marked(by_length(records), found_errors):
        yield time_per_token(drawn, report.environment)


CASE = Case(measure_shapes, show, SCALES, operations=(ATTENTION,), peers=("sdpa",), backends=True)
