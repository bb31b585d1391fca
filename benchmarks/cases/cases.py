"""What users' models have beside the main case: wide heads, slow decays, short documents, float32, few heads, the host.

Each row has what is wanted of it: a part of the memory floor, milliseconds, or a ratio to another call of ours in the
same process (``against``) or, of the host, to softmax attention. Errors are against float64 in the same run.
"""

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.errors import errors, mark, reference, within
from benchmarks.harness.timing import copy_rate, host_us, in_flight_us
from lightning_attention import decay
from lightning_attention.bench.attention import BACKWARD, BOTH, FORWARD, Problem, Shape, has, result_or_error
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import ATTENTION, PACKED_ATTENTION, SDPA, Peer, is_ours, ours
from lightning_attention.bench.render import Table
from lightning_attention.bench.report import Record, Report
from lightning_attention.bench.timing import time_calls, wall_ms
from lightning_attention.check import budget

SUITE, HOST = "cases", "cases host"
FLUSHES = 8  # 2 ms before each call, in which the host prepares the longest of them
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

FLOOR, RATIO, MS = "floor_fraction", "ratio", "ms"
AT_LEAST = (FLOOR,)  # of the others at most so much is wanted

DECAYS: dict[str, Callable[[int], Tensor | None]] = {
    "ALiBi": decay.alibi,
    "last layer": lambda H: decay.transnormer(H, 31, 32),  # slopes times 1e-5, as in MiniMax
    "RetNet": decay.retnet,
    "none": lambda _: None,
}


@dataclass(frozen=True)
class Row:
    """A call: its shape, what is special about it, and, by pass, what is wanted of it: ``(quantity, bound)``.

    ``against``: what is different in the call that it is held against. ``lengths``: of a packed batch.
    """

    case: str
    B: int
    T: int
    H: int
    D: int
    E: int
    decays: str = "ALiBi"
    dtype: torch.dtype = BF16
    precision: str = "highest"
    lengths: tuple[int, ...] = ()
    learnable: bool = False
    batch_invariant: bool = False
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    against: Mapping[str, Any] = field(default_factory=dict)
    wanted: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """B, T, H, D and, where it is another, E."""
        return ", ".join(map(str, (self.B, self.T, self.H, self.D, *([self.E] if self.E != self.D else []))))

    @property
    def name(self) -> str:
        """The case and the shape."""
        return f"{self.case}: {self.shape}"

    def bytes(self, pass_: str) -> int:
        """What the definition reads and writes: q, k, v and o; q, k, v, do, dq, dk and dv."""
        numbers = {FORWARD: 2 * self.D + 2 * self.E, BACKWARD: 4 * self.D + 3 * self.E}
        each = sum(numbers.values()) if pass_ == BOTH else numbers[pass_]
        return self.B * self.T * self.H * each * self.dtype.itemsize

    def problem(self, device: torch.device) -> Problem:
        """The tensors of the call."""
        return Problem(Shape(self.B, self.T, self.H, self.D), self.dtype, device, E=self.E,
                       log_decay=DECAYS[self.decays], learnable=self.learnable)  # fmt: skip

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        """Where the sequences of a packed batch begin."""
        if not self.lengths:
            return None
        return torch.tensor([0, *self.lengths], device=device).cumsum(0, dtype=torch.int32)

    def ours(self, device: torch.device, backend: str | None) -> Peer:
        """Our call."""
        return ours(backend, cu_seqlens=self.cu_seqlens(device), batch_invariant=self.batch_invariant)

    def exact(self, device: torch.device) -> Peer:
        """The same in any dtype. Sequences of equal length are a batch to it: one by one, 9000 of them take 20 s."""
        if len(set(self.lengths)) != 1:
            return ours("tiled", cu_seqlens=self.cu_seqlens(device))
        dense, shape = ours("tiled").attention(), (len(self.lengths), self.lengths[0])

        def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
            q, k, v = (x.unflatten(1, shape)[0] for x in (q, k, v))
            return dense(q, k, v, log_decay).flatten(0, 1)[None]

        return Peer("exact", "exact", "lightning-attention", {ATTENTION: lambda: forward})

    def others(self, peers: Sequence[Peer], device: torch.device) -> list[Peer]:
        """The peers that have such a call."""
        if self.learnable or self.batch_invariant:
            return []
        able = [p for p in peers if not p.softmax]
        bounds = self.cu_seqlens(device)
        if bounds is None:
            return [p for p in able if ATTENTION in p.operations]
        return [replace(p, operations={ATTENTION: partial(p.operations[PACKED_ATTENTION], bounds)})
                for p in able if PACKED_ATTENTION in p.operations]  # fmt: skip

    def budget(self, kind: str) -> float:
        """The error that ``lightning-attention check`` allows; TF32, which Triton cuts off, gets that of bfloat16."""
        return budget(BF16 if self.precision == "high" else self.dtype, kind)


def floor(forward: float, backward: float) -> dict[str, tuple[str, float]]:
    """Wanted: at least these parts of the memory floor."""
    return {FORWARD: (FLOOR, forward), BACKWARD: (FLOOR, backward)}


def log_normal(tokens: int, median: float, sigma: float) -> tuple[int, ...]:
    """Lengths of documents as corpora have them, to so many tokens in all."""
    generator = torch.Generator().manual_seed(0)
    found: list[int] = []
    while sum(found) < tokens:
        drawn = median * math.exp(sigma * torch.randn((), generator=generator, device="cpu").item())
        found.append(min(max(1, round(drawn)), tokens - sum(found)))
    return tuple(found)


def _packed(case: str, lengths: tuple[int, ...], bound: float | None = None, decays: str = "ALiBi") -> Row:
    wanted = {} if bound is None else {BOTH: (RATIO, bound)}
    return Row(case, 1, sum(lengths), 16, 128, 128, decays, lengths=lengths, passes=(FORWARD, BACKWARD, BOTH),
               against={"lengths": ()}, wanted=wanted)  # fmt: skip


def _learned(B: int, T: int, H: int, D: int, E: int, bound: float | None = None) -> Row:
    wanted = {} if bound is None else {BACKWARD: (RATIO, bound)}
    return Row("learnable log_decay", B, T, H, D, E, learnable=True, passes=(BACKWARD,), against={"learnable": False},
               wanted=wanted)  # fmt: skip


def _invariant(B: int, T: int, H: int, D: int, E: int, bound: float | None = None) -> Row:
    wanted = {} if bound is None else {FORWARD: (RATIO, bound)}
    return Row("batch_invariant", B, T, H, D, E, batch_invariant=True, against={"batch_invariant": False},
               wanted=wanted)  # fmt: skip


MAIN, LONG, LONG_FEW = (4, 8192, 32, 128, 128), (1, 131_072, 32, 128, 128), (1, 131_072, 8, 128, 128)
IEEE, TF32 = "float32, IEEE", "float32, TF32"
LAST = "slow decays: last layer"

ROWS = (
    Row("main case", *MAIN, wanted={BACKWARD: (FLOOR, 0.64)}),
    Row("LRPE layer", 4, 8192, 8, 256, 128, against={"D": 128}, wanted=floor(0.45, 0.28)),
    Row("LRPE layer", 4, 8192, 32, 256, 128, against={"D": 128}, wanted=floor(0.60, 0.36)),
    Row("wide heads", 2, 8192, 16, 256, 256, wanted=floor(0.48, 0.24)),
    Row("wide heads", 2, 8192, 16, 192, 192, wanted=floor(0.38, 0.18)),
    Row("wide heads", 2, 8192, 16, 160, 160),
    Row("wide values", 4, 8192, 8, 128, 256),
    Row("odd heads", 4, 8192, 32, 80, 80, wanted=floor(0.75, 0.45)),
    Row("odd heads", 3, 5000, 12, 96, 96),
    Row("ALiBi, long", *LONG),
    Row("ALiBi, long", *LONG_FEW),
    Row(LAST, *LONG, "last layer", wanted=floor(0.68, 0.47)),
    Row("slow decays: RetNet", *LONG, "RetNet", wanted=floor(0.68, 0.47)),
    Row("no decay", *LONG, "none", wanted=floor(0.68, 0.47)),
    Row(LAST, *LONG_FEW, "last layer", wanted=floor(0.62, 0.46)),
    Row("slow decays: RetNet", *LONG_FEW, "RetNet", wanted=floor(0.62, 0.46)),
    Row("no decay", *LONG_FEW, "none", wanted=floor(0.62, 0.46)),
    Row(LAST, 1, 262_144, 16, 64, 64, "last layer"),
    _learned(*MAIN, bound=1.3),
    _learned(*LONG, bound=1.3),
    _learned(4, 8192, 32, 64, 64),
    _packed("packed, 640 of 100", (100,) * 640, 1.15),
    _packed("packed, 9000 of 7", (7,) * 9000, 1.3),
    _packed("packed, log-normal", log_normal(65_536, 400, 1.2)),
    _packed("packed, log-normal, last layer", log_normal(65_536, 400, 1.2), decays="last layer"),
    _invariant(*LONG_FEW, bound=1.15),
    _invariant(4, 8192, 8, 128, 128),
    Row(IEEE, 2, 8192, 16, 128, 128, dtype=FP32, wanted={FORWARD: (MS, 1.6), BACKWARD: (MS, 5.0)}),
    Row(TF32, 2, 8192, 16, 128, 128, dtype=FP32, precision="high", wanted={FORWARD: (MS, 0.6), BACKWARD: (MS, 1.3)}),
    Row(IEEE, 2, 8192, 16, 64, 64, dtype=FP32),
    Row("float16", *MAIN, dtype=FP16),
    Row("float16, wide heads", 2, 8192, 16, 256, 256, dtype=FP16),
    Row("odd length", 4, 8191, 32, 128, 128),
    Row("odd length, few heads", 1, 100_001, 8, 128, 128),
)


class HostRow(NamedTuple):
    """The host's time of a call, held against softmax attention's: ``kernel`` on a GPU.

    ``in_flight``: of calls one after another, the device's work included where it takes longer; else of the calling
    thread alone.
    """

    case: str
    shape: tuple[int, int, int, int]
    passes: tuple[str, ...]
    kernel: str
    bound: float
    in_flight: bool = False

    @property
    def name(self) -> str:
        """The case and the shape."""
        return f"{self.case}: {', '.join(map(str, self.shape))}"


HOST_ROWS = (
    HostRow("eager host", (1, 64, 4, 64), (FORWARD, BOTH), "sdpa_flash", 1.25),
    HostRow("eager, host-bound", (1, 4096, 16, 128), (BOTH,), "sdpa_cudnn", 1.0, in_flight=True),
    HostRow("eager, host-bound", (3, 5000, 12, 96), (BOTH,), "sdpa_cudnn", 1.0, in_flight=True),
)


class Scale(NamedTuple):
    """The rows, how long each call is timed, and how often the host's."""

    rows: tuple[Row, ...]
    host_rows: tuple[HostRow, ...]
    seconds: float
    host_repeats: int

    def names(self) -> list[str]:
        """The names of all rows."""
        return [*(row.name for row in self.rows), *(row.name for row in self.host_rows)]


def small(row: Row) -> Row:
    """The same case at a size that a CPU does at once, with nothing wanted of it."""
    lengths = tuple(min(n, 100) for n in row.lengths[:8])
    against = {key: value // 4 if key == "D" else value for key, value in row.against.items()}
    return replace(row, B=min(row.B, 2), T=sum(lengths) or 64 + row.T % 64, H=2, D=row.D // 4, E=row.E // 4,
                   lengths=lengths, wanted={}, against=against)  # fmt: skip


QUICK = tuple(row for row in ROWS if row.wanted)


def _smaller(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Each once: some differ in nothing but their size."""
    return tuple({row.name: row for row in map(small, rows)}.values())


SCALES = {
    "cuda": Scale(ROWS, HOST_ROWS, 0.2, 400),
    "cuda quick": Scale(QUICK, HOST_ROWS[:2], 0.05, 100),
    "cpu": Scale(_smaller(ROWS), HOST_ROWS[:1], 0.02, 40),
    "cpu quick": Scale(_smaller(QUICK), (), 0.0, 10),
}


def measure(run: Run) -> None:
    """Every row that is asked for.

    ``floor_fraction`` is the time to move what the definition reads and writes at the copy rate of this process,
    divided by the time taken. ``ratio`` is the time over that of the call that the row is held against, which takes
    turns with it. ``met``: whether the quantity that is ``wanted`` is within its ``bound``.
    """
    scale: Scale = run.scale
    rows = [row for row in scale.rows if run.only is None or row.name in run.only]
    host_rows = [row for row in scale.host_rows if run.only is None or row.name in run.only]
    rate = copy_rate(run.device)
    run.add("copy", bytes_per_second=rate)
    if run.device.type == "cuda" and len(rows) > 4:
        run.add("compiling", seconds=compile_all(rows, run.backend))
    for row in rows:
        with _precision(row.precision):
            _measure(run, row, rate)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    for host_row in host_rows:
        _measure_host(run, host_row)


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    """float32 products at this precision, while the block runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compile_all(rows: list[Row], backend: str | None) -> float:
    """Have Triton compile what the rows need into its cache on disk, in processes side by side; the seconds taken.

    A hundred kernels or so, one after another, would be most of the run.
    """
    start = time.perf_counter()
    workers = min(len(rows), os.cpu_count() or 1, 12)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(_compile, backend=backend), rows))
    return time.perf_counter() - start


def _compile(row: Row, backend: str | None) -> None:
    device = torch.device("cuda")
    with _precision(row.precision):
        for each in (row, replace(row, **row.against)):
            with contextlib.suppress(Exception):  # it fails again where it is measured, and is reported there
                each.problem(device).call(each.ours(device, backend), BOTH)()
            torch.cuda.empty_cache()


def _measure(run: Run, row: Row, rate: float) -> None:
    device, problem, own = run.device, row.problem(run.device), row.ours(run.device, run.backend)
    peers = [own, *row.others(run.peers, device)]
    wanted = reference(problem, row.exact(device))
    wrong = {p.name: result_or_error(partial(errors, problem, p, wanted)) for p in peers}
    del wanted
    base = replace(row, **row.against) if row.against else None
    for pass_ in row.passes:
        able = [p for p in peers if has(p, pass_)]
        calls = {p.name: partial(problem.call, p, pass_) for p in able if "error" not in wrong[p.name]}
        if base is not None:
            calls["against"] = partial(base.problem(device).call, base.ours(device, run.backend), pass_)
        ready: dict[str, Callable[[], object]] = {}

        def prepare(name: str) -> dict[str, Any]:
            call = calls[name]()  # noqa: B023
            wall_ms(call, device)
            ready[name] = call  # noqa: B023
            return {}

        found = {name: result_or_error(partial(prepare, name)) for name in calls}
        for name, timing in time_calls(ready, device, seconds=run.scale.seconds, flushes=FLUSHES).items():
            found[name] |= asdict(timing)
        ready.clear()
        for p in able:
            record = wrong[p.name] if "error" in wrong[p.name] else found[p.name]
            if "ms" in record:
                record[FLOOR] = row.bytes(pass_) / rate / record["ms"] * 1e3
                record |= _error(row, wrong[p.name], pass_, ours=p is own)
            if p is own and "ms" in record:
                if "ms" in found.get("against", {}):
                    record |= {"against": dict(row.against), RATIO: record["ms"] / found["against"]["ms"]}
                record |= judged(record, row.wanted.get(pass_))
            run.add(SUITE, p, **_sizes(row), **{"pass": pass_}, **record)


def _sizes(row: Row) -> dict[str, Any]:
    sequences = {"sequences": len(row.lengths)} if row.lengths else {}
    return {"case": row.case, "B": row.B, "T": row.T, "H": row.H, "D": row.D, "E": row.E, "dtype": row.dtype,
            "decays": row.decays} | sequences  # fmt: skip


def _error(row: Row, found: dict[str, float], pass_: str, *, ours: bool) -> dict[str, Any]:
    """The pass's error that takes up most of its budget; a failure if it is ours and past it."""
    kinds = {name: "output" if name == "output" else "decay gradient" if name == "dlog_decay" else "gradient"
             for name in found if pass_ == BOTH or (name == "output") == (pass_ == FORWARD)}  # fmt: skip
    worst = max(kinds, key=lambda name: found[name] / row.budget(kinds[name]) if found[name] >= 0 else math.inf)
    return {"worst": worst} | within(row.budget(kinds[worst]) if ours else math.inf, found[worst])


def judged(record: Record, wanted: tuple[str, float] | None) -> dict[str, Any]:
    """What is wanted and whether it is met, as fields of a record."""
    if wanted is None or wanted[0] not in record:
        return {}
    quantity, bound = wanted
    value = record[quantity]
    return {"wanted": quantity, "bound": bound, "met": value >= bound if quantity in AT_LEAST else value <= bound}


def _measure_host(run: Run, row: HostRow) -> None:
    """Ours and softmax attention's in turns: the best of five medians each, because machines stutter."""
    softmax = next(p for p in SDPA if p.name == (row.kernel if run.device.type == "cuda" else "sdpa"))
    problem = Problem(Shape(*row.shape), BF16, run.device)
    timer = in_flight_us if row.in_flight else host_us
    for pass_ in row.passes:
        calls: dict[str, Callable[[], object]] = {}

        def prepare(p: Peer) -> dict[str, float]:
            calls[p.name] = problem.call(p, pass_)  # noqa: B023
            wall_ms(calls[p.name], run.device)  # noqa: B023
            return {}

        peers = [ours(run.backend), softmax, *(p for p in run.peers if not p.softmax and has(p, pass_))]
        found: dict[str, dict[str, Any]] = {p.name: result_or_error(partial(prepare, p)) for p in peers}
        for _ in range(5):
            for name, call in calls.items():
                us = timer(call, run.device, repeats=run.scale.host_repeats)
                found[name]["us"] = min(us, found[name].get("us", math.inf))
        own, theirs = found[peers[0].name], found[softmax.name]
        if "us" in own and "us" in theirs:
            own |= {"against": softmax.name, RATIO: own["us"] / theirs["us"]}
            own |= judged(own, (RATIO, row.bound))
        for p in peers:
            sizes = dict(zip("BTHD", row.shape, strict=True)) | {"E": row.shape[3], "dtype": BF16}
            run.add(HOST, p, case=row.case, **sizes, **{"pass": pass_}, **found[p.name])


def _row(r: Record) -> tuple[str, str, str]:
    sizes = [r[x] for x in "BTHD"] + ([r["E"]] if r["E"] != r["D"] else [])
    return r["case"], ", ".join(map(str, sizes)), r["pass"]


def _time(r: Record) -> float:
    return next((float(r[unit]) for unit in ("ms", "us") if unit in r), math.nan)


def _bound(r: Record) -> str:
    if "wanted" not in r:
        return ""
    return f"{'≥' if r['wanted'] in AT_LEAST else '≤'} {r['bound']:g}{' ms' if r['wanted'] == MS else ''}"


def show(report: Report) -> Iterator[Shown]:
    """A table of what is wanted and what came, and how much of it is met."""
    records = [*report.find(SUITE), *report.find(HOST)]
    if not records:
        return
    labels = list(dict.fromkeys(r["label"] for r in records if not is_ours(r["implementation"])))
    rows: dict[tuple[str, str, str], list[str]] = {}
    times: dict[tuple[str, str, str], float] = {}

    def taken(r: Record) -> str:
        return f"{r['ms']:.3f} ms" if "ms" in r else f"{r['us']:.1f} µs" if "us" in r else "failed"

    for r in (r for r in records if is_ours(r["implementation"])):
        times[_row(r)] = _time(r)
        part = f"{r[FLOOR]:.2f}" if FLOOR in r else ""
        ratio = f"{r[RATIO]:.2f}" if RATIO in r else ""
        error = f"{float(r['relative_error']):.1e} {r['worst']}" if "relative_error" in r else ""
        met = ("yes" if r["met"] else "NO") if "met" in r else ""
        rows[_row(r)] = [taken(r), part, ratio, _bound(r), met, error, *[""] * len(labels)]
    for r in (r for r in records if not is_ours(r["implementation"])):
        wrong = mark(r["relative_error"]) if "relative_error" in r else ""
        more = f" ({_time(r) / times[_row(r)]:.1f}×{wrong})" if "error" not in r else ""
        rows[_row(r)][6 + labels.index(r["label"])] = taken(r) + more
    columns = [
        "case",
        "B, T, H, D, E",
        "pass",
        "ours",
        "of the\nfloor",
        "ratio",
        "wanted",
        "met",
        "worst error",
        *labels,
    ]
    yield Table("Cases (peers: times slower than ours)", columns, [[*k, *cells] for k, cells in rows.items()], words=3)
    asked = [r for r in records if "met" in r]
    if asked:
        missed = [f"{r['case']} ({', '.join(_row(r)[1:])})" for r in asked if not r["met"]]
        yield f"met {len(asked) - len(missed)} of {len(asked)}" + (f"; not met: {'; '.join(missed)}" if missed else "")


CASE = Case(measure, show, SCALES, operations=(ATTENTION,), backends=True, rows=Scale.names)
