"""Decode, prefill and speculation over a pool of states: time, part of the copy rate, errors, peers.

On a GPU a call is one CUDA graph, where the row does not say that it is eager, its L2 flushed before every replay; the
implementations of a row take turns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.pool import DECODE, EAGER, PREFILL, SPECULATE, Batch, Bound, Known, pooled
from benchmarks.harness.timing import captured, copy_rate, host_us
from lightning_attention import (
    QuantizedStates,
    RecentTokens,
    decay,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_fold,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from lightning_attention.bench.attention import result_or_error
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import OURS, Peer
from lightning_attention.bench.render import Figure, Panel, Table, caption, lines, pivot
from lightning_attention.bench.report import Record, Report
from lightning_attention.bench.timing import Call, time_calls
from lightning_attention.check import relative_error

SUITE, HOST = "serving", "decode, eager, CPU time"
KEYS = {"operation": "what", "size": "size", "state": "state"}  # of the tables
RINGS, EIGHT_BITS, R = "rings", "8 bits", 16  # implementations, and the tokens that their rings hold


@dataclass(frozen=True)
class Scale:
    """H heads of D, E = D. ``decode`` has values of N. ``packings``: name, lengths, and whether they start from zero.

    Single tokens come first, as engines put them. ``drafts``: N, and how many each sequence has.
    """

    H: int
    D: int
    dtype: torch.dtype
    decode: tuple[int, ...]
    packings: tuple[tuple[str, tuple[int, ...], bool], ...]
    drafts: tuple[int, int]
    seconds: float


SCALES = {
    "cuda": Scale(
        64, 128, torch.bfloat16, (1, 8, 32, 64, 256),
        (("8 equal prompts", (2048,) * 8, True),
         ("8 prompts, one long", (9000, 3001, 1700, 1100, 700, 500, 300, 83), True),
         ("2 chunks, 200 tokens", (1,) * 200 + (4096,) * 2, False)),
        drafts=(64, 4), seconds=0.2,
    ),
    "cpu": Scale(
        4, 64, torch.float32, (1, 8),
        (("8 equal prompts", (128,) * 8, True),
         ("8 prompts, one long", (562, 189, 106, 69, 44, 31, 18, 5), True),
         ("2 chunks, 20 tokens", (1,) * 20 + (256,) * 2, False)),
        drafts=(8, 4), seconds=0.1,
    ),
}  # fmt: skip


def _decode(b: Batch) -> Bound:
    return pooled(b, lambda pool: lightning_attention_decode(b.q, b.k, b.v, b.log_decay, pool, slots=b.slots))


def _prefill(b: Batch) -> Bound:
    fresh = torch.ones(b.N, dtype=torch.bool, device=b.q.device) if b.fresh else None
    call = partial(lightning_attention_prefill, cu_seqlens=b.cu_seqlens, slots=b.slots, fresh=fresh)
    return pooled(b, lambda pool: call(b.q, b.k, b.v, b.log_decay, pool))


def _verify_and_commit(b: Batch, pool: Any, recent: RecentTokens | None) -> Tensor:
    accepted = torch.ones(b.q.shape[0], dtype=torch.bool, device=b.q.device)
    packed: dict[str, Any] = {"cu_seqlens": b.cu_seqlens, "slots": b.slots, "recent": recent}
    out = lightning_attention_verify(b.q, b.k, b.v, b.log_decay, pool, **packed)
    lightning_attention_commit(b.k, b.v, b.log_decay, pool, accepted=accepted, **packed)
    return out


def _speculate(b: Batch) -> Bound:
    return pooled(b, lambda pool: _verify_and_commit(b, pool, None))


def _decode_each(b: Batch) -> Bound:
    """The drafts of every sequence, equally many, one decode call after another."""
    q, k, v = ([step.contiguous() for step in x.unflatten(0, (b.N, -1)).unbind(1)] for x in (b.q, b.k, b.v))

    def run(pool: Tensor) -> list[Tensor]:
        steps = zip(q, k, v, strict=True)
        return [lightning_attention_decode(*qkv, log_decay=b.log_decay, state=pool, slots=b.slots) for qkv in steps]

    return pooled(b, run)


def _with_rings(run: Callable[[Batch, Any, RecentTokens], Tensor], in_8_bits: bool, b: Batch) -> Bound:
    """A call that updates a pool and its rings in place; what they mean together is looked at in a copy."""
    (N, H, D, E), slots = b.pool.shape, b.slots.long()
    recent = RecentTokens.empty(N, H, D, E, R, b.q.dtype, b.q.device)
    pool: Tensor | QuantizedStates = b.pool.clone()
    if in_8_bits:
        pool = QuantizedStates.empty(N, H, D, E, b.q.device)
        pool.quantize(b.pool.float())

    def states() -> Tensor:
        rings = RecentTokens(recent.k, recent.v, recent.count.clone())
        if isinstance(pool, Tensor):
            whole = pool.clone()
            lightning_attention_fold(whole, rings, b.log_decay)
            return whole[slots]
        planes = QuantizedStates(pool.high.clone(), pool.low.clone(), pool.scale.clone())
        lightning_attention_fold(planes, rings, b.log_decay)
        return planes.dequantize(b.slots)

    return Bound(lambda: run(b, pool, recent), states)


def _decode_with_rings(b: Batch, pool: Any, recent: RecentTokens) -> Tensor:
    return lightning_attention_decode(b.q, b.k, b.v, b.log_decay, pool, slots=b.slots, recent=recent)


def _forward(b: Batch) -> Bound:
    """The training forward over the same packing; it returns new states."""
    q, k, v, initial = b.q[None], b.k[None], b.v[None], b.initial()
    finals: list[Tensor | None] = [None]

    def call() -> Tensor:
        out, finals[0] = lightning_attention(
            q, k, v, b.log_decay, initial_state=initial, output_final_state=True, cu_seqlens=b.cu_seqlens
        )
        return out

    return Bound(call, lambda: finals[0])


def _dense(b: Batch) -> Bound:
    """The training forward of one sequence of as many tokens: another function, so its numbers are not compared."""
    q, k, v = b.q[None], b.k[None], b.v[None]
    return Bound(lambda: lightning_attention(q, k, v, b.log_decay).output, lambda: None)


#: Ours, and behind the peers what ours is held against.
OWN = Peer(OURS, "ours", "lightning-attention", {
    DECODE: _decode, PREFILL: _prefill, EAGER: _prefill, SPECULATE: _speculate,
})  # fmt: skip
OTHER_WAYS = (
    *(
        Peer(
            name,
            label,
            "lightning-attention",
            {
                DECODE: partial(_with_rings, _decode_with_rings, name == EIGHT_BITS),
                SPECULATE: partial(_with_rings, _verify_and_commit, name == EIGHT_BITS),
            },
            states=states,
        )
        for name, label, states in (
            (RINGS, "ours, rings", (torch.float32, torch.bfloat16)),
            (EIGHT_BITS, "ours, 8 bits", (torch.float32,)),
        )
    ),
    Peer("forward", "our forward, packed", "lightning-attention", {PREFILL: _forward}),
    Peer("dense", "our forward, dense", "lightning-attention", {PREFILL: _dense}),
    Peer("decodes", "our decode, one by one", "lightning-attention", {SPECULATE: _decode_each}),
)


@dataclass(frozen=True)
class Row:
    """An operation, or decode's time on the host, on sequences of these lengths; ``fresh``: they start from zero."""

    what: str
    size: str
    lengths: tuple[int, ...]
    state: torch.dtype = torch.float32
    fresh: bool = False

    @property
    def name(self) -> str:
        """All that tells it from others, as ``--only`` finds it."""
        return f"{self.what}, {self.size}, {str(self.state).removeprefix('torch.')}"

    @property
    def operation(self) -> str:
        """The one of a peer's that it measures."""
        return DECODE if self.what == HOST else self.what


def rows_of(scale: Scale) -> Iterator[Row]:
    """All rows, in the order in which they are measured."""
    for state in (torch.float32, torch.bfloat16):
        yield from (Row(DECODE, f"N = {N}", (1,) * N, state) for N in scale.decode)
    yield Row(HOST, "N = 1", (1,))
    for what in (PREFILL, EAGER):
        yield from (Row(what, name, lengths, fresh=fresh) for name, lengths, fresh in scale.packings)
    N, drafts = scale.drafts
    yield Row(SPECULATE, f"N = {N}, {drafts} drafts", (drafts,) * N)


class Problem:
    """A batch of random numbers, and what its outputs and states must be."""

    def __init__(self, scale: Scale, row: Row, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        N, T = len(row.lengths), sum(row.lengths)
        bounds = torch.tensor((0, *row.lengths), dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        # Drawn in float32 whatever it is kept in, so that q, k and v are the same for both types of state.
        pool = torch.randn(N, scale.H, scale.D, scale.D, generator=generator, device=device).to(row.state)
        q, k, v = (torch.randn(T, scale.H, scale.D, generator=generator, dtype=scale.dtype, device=device)
                   for _ in range(3))  # fmt: skip
        slots = torch.randperm(N, generator=generator, device=device, dtype=torch.int32)
        log_decay = decay.alibi(scale.H).to(device)
        self.batch = Batch(q, k, v, log_decay, pool, slots, bounds.to(device), row.fresh)
        self._heads = sorted({0, scale.H - 1})
        self._wanted = self._reference(row.lengths)

    def _reference(self, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Output and states in float64 of the first and last head, which forget fastest and slowest.

        By the tiled backend, which the tests hold against the recurrence.
        """
        b, equal = self.batch, len(set(lengths)) == 1
        q, k, v = (x[:, self._heads].double() for x in (b.q, b.k, b.v))
        q, k, v = (x.unflatten(0, (b.N, -1)) if equal else x[None] for x in (q, k, v))
        initial = b.initial()
        out, final = lightning_attention(
            q, k, v, b.log_decay[self._heads],
            initial_state=None if initial is None else initial[:, self._heads].double(),
            output_final_state=True, cu_seqlens=None if equal else b.cu_seqlens, backend="tiled",
        )  # fmt: skip
        assert final is not None
        return out.flatten(0, 1), final

    @property
    def bytes(self) -> int:
        """What must be read or written once: q, k, v, the output, and the states, twice where they are not fresh."""
        b = self.batch
        return 4 * b.q.numel() * b.q.itemsize + (1 if b.fresh else 2) * b.pool.numel() * b.pool.itemsize

    def bytes_with_rings(self, in_8_bits: bool) -> float:
        """With rings, on average: a state is written once in R steps, and a step reads (R − 1) / 2 tokens.

        In 8 bits a plane is read, and once in R steps another plane; then both are written.
        """
        b = self.batch
        row = b.q.numel() * b.q.itemsize
        states = (1 + 3 / R) * b.pool.numel() if in_8_bits else (1 + 1 / R) * b.pool.numel() * b.pool.itemsize
        return (6 + R - 1) * row + states

    def errors(
        self, output: Tensor | list[Tensor], states: Tensor, known: Known | None = None, in_8_bits: bool = False
    ) -> dict[str, float]:
        """Relative Frobenius errors. ``known``: see :class:`Bound`.

        Raises:
            ArithmeticError: one is past its budget. 16 bits: the roundings of three operands and of the result make
                3e-3 of an output, kernels that add partial outputs in 16 bits somewhat more; a state is rounded once.
                A pool in 8 bits makes 6e-3.
        """
        if isinstance(output, list):
            output = torch.stack(output, 1)
        output = output.view(self.batch.v.shape)
        wanted_output, wanted_states = self._wanted
        if known is not None:
            wanted_output = known(wanted_output, self._heads)
        found = {
            "output_error": relative_error(output[:, self._heads], wanted_output),
            "state_error": relative_error(states[:, self._heads], wanted_states),
        }
        b = self.batch
        coarse = b.q.dtype.itemsize == 2 or in_8_bits
        budgets = (1e-2 if coarse else 1e-4, 5e-3 if coarse or b.pool.dtype.itemsize == 2 else 1e-4)
        for (name, error), budget in zip(found.items(), budgets, strict=True):
            if not error <= budget:
                raise ArithmeticError(f"{name} is {error:.1e}, and may be {budget:g}")
        return found


@torch.no_grad()
def measure(run: Run) -> None:
    """Every row with every implementation that has its operation, into the report.

    ``copy_fraction`` is the time to move what the operation must read and write at the copy rate of this process,
    over the time taken. An implementation that fails, or whose numbers are not right, is recorded as an error and not
    timed.
    """
    scale: Scale = run.scale
    rate = copy_rate(run.device)
    run.add("copy", bytes_per_second=rate)
    for row in rows_of(scale):
        asked_for = run.only is None or row.name in run.only
        if asked_for and (row.what != EAGER or any(EAGER in p.operations for p in run.peers)):
            _measure(run, rate, row)


def _measure(run: Run, rate: float, row: Row) -> None:
    scale, device, what = run.scale, run.device, row.what
    problem = Problem(scale, row, device)
    able = [p for p in (OWN, *run.peers, *OTHER_WAYS) if row.operation in p.operations and row.state in p.states]
    calls: dict[str, Call] = {}

    def prepare(peer: Peer) -> dict[str, float]:
        bound = peer.operations[row.operation](problem.batch)
        output, states = bound.call(), bound.states()
        found = {} if states is None else problem.errors(output, states, bound.known, peer.name == EIGHT_BITS)
        calls[peer.name] = bound.call if what in (HOST, EAGER) else captured(bound.call, device)
        return found

    found = {p.name: result_or_error(partial(prepare, p)) for p in able}
    if what == HOST:
        for name, call in calls.items():
            found[name]["us"] = host_us(call, device)
    else:
        for name in (RINGS, EIGHT_BITS):
            steps = calls.pop(name, None) if what == DECODE else None
            if steps is not None:
                found[name] |= _over_a_turn(steps, device, scale.seconds)
                least = problem.bytes_with_rings(name == EIGHT_BITS)
                found[name]["copy_fraction"] = least / rate / (found[name]["ms"] * 1e-3)
        for name, timing in time_calls(calls, device, seconds=scale.seconds).items():
            found[name] |= asdict(timing)
            # Speculation is two operations, and the other ways to do it must move other bytes; dense has no states.
            if what != SPECULATE and "state_error" in found[name]:
                found[name]["copy_fraction"] = problem.bytes / rate / (timing.ms * 1e-3)
    _hold_against(able, found)
    sizes = {"what": what, "size": row.size, "N": len(row.lengths), "T": sum(row.lengths), "H": scale.H, "D": scale.D,
             "dtype": scale.dtype, "state": row.state}  # fmt: skip
    for p in able:
        run.add(SUITE, p, **sizes, **found[p.name])


def _hold_against(able: Sequence[Peer], found: dict[str, dict[str, Any]]) -> None:
    """``ratio``: the time over that of the one that a peer is held ``against``, where both have been timed."""
    for p in able:
        mine, theirs = _us(found[p.name]), _us(found.get(p.against or "", {}))
        if mine and theirs:
            found[p.name] |= {"against": p.against, "ratio": mine / theirs}


def _over_a_turn(call: Call, device: torch.device, seconds: float) -> dict[str, float]:
    """The mean of R steps, one after another, and the slowest: of each the median of many turns."""
    call_of_each = {str(step): call for step in range(R)}
    medians = [timing.ms for timing in time_calls(call_of_each, device, seconds=seconds).values()]
    return {"ms": mean(medians), "slowest_ms": max(medians)}


def _us(record: Record) -> float | None:
    return record.get("us", record["ms"] * 1e3 if "ms" in record else None)


def tables(records: list[Record]) -> Iterator[Table]:
    """A row an operation and size: our time and part of the copy rate, and the others' times over ours.

    Then the same rows with what is held against another than ours.
    """
    mine = {tuple(r[key] for key in KEYS.values()): _us(r) for r in records if r["implementation"] == OURS}

    def cells(r: Record) -> dict[str, str]:
        us, own = _us(r), mine.get(tuple(r[key] for key in KEYS.values()))
        cell = "failed" if us is None else f"{us:.1f}"
        errors = ", ".join(f"{r[name]:.0e}" for name in ("output_error", "state_error") if name in r)
        if r["implementation"] != OURS:
            slowest = f"; slowest {r['slowest_ms'] * 1e3:.1f}" if "slowest_ms" in r else ""
            theirs = {r["label"]: f"{cell} ({us / own:.2f}×{slowest})" if us and own else cell}
            return theirs | ({"errors in 8 bits\noutput, state": errors} if r["implementation"] == EIGHT_BITS else {})
        copied = {"copy": f"{r['copy_fraction']:.2f}"} if "copy_fraction" in r else {}
        return {r["label"]: cell} | copied | {"our errors\noutput, state": errors}

    title = "Serving operations (µs; part of the copy rate; others: over our time)"
    yield from pivot(title, KEYS, records, cells, words=3)
    title = "Ours by the engines' signatures: its time over the engine's own"
    held = [r for r in records if "ratio" in r]
    yield from pivot(title, KEYS, held, lambda r: {f"{r['label']}\nover {r['against']}": f"{r['ratio']:.2f}"}, words=3)


def figure(records: list[Record], environment: dict[str, Any]) -> Figure:
    """Decode's part of the copy rate against the number of sequences."""
    drawn = [r for r in records if r["what"] == DECODE and "copy_fraction" in r]
    panels = []
    for state in ("float32", "bfloat16"):
        found = lines((r for r in drawn if r["state"] == state), "N", "copy_fraction")
        y = "bytes that must move ÷ time ÷ copy rate"
        panels.append(Panel(f"state in {state}", "sequences, one token each", y, found, fraction=True))
    how = ", flushed L2, one CUDA graph a call" if environment["device_type"] == "cuda" else ""
    setting = f"q, k, v in {drawn[0]['dtype']}, {drawn[0]['H']} heads of {drawn[0]['D']}{how}"
    return Figure("Decode: part of the copy rate", panels, caption(environment, setting))


def show(report: Report) -> Iterator[Shown]:
    """Tables, and decode as a figure."""
    records = report.find(SUITE)
    yield from tables(records)
    if any(r["what"] == DECODE and "copy_fraction" in r for r in records):
        yield figure(records, report.environment)


CASE = Case(
    measure, show, SCALES, operations=(DECODE, PREFILL, EAGER, SPECULATE),
    rows=lambda scale: (row.name for row in rows_of(scale)),
)  # fmt: skip
