"""Decode, prefill and speculation over a pool of states: time, part of the copy rate, errors, other people's kernels.

On a GPU a call is one CUDA graph, its L2 flushed before every replay; the implementations of a case take turns.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention
from lightning_attention.bench.op import Say, _reason, relative_error
from lightning_attention.bench.report import Report
from lightning_attention.bench.serving_peers import DECODE, PREFILL, SPECULATE, Batch, Bound, Server
from lightning_attention.bench.timing import Call, captured, copy_rate, host_us, time_calls

SUITE, HOST = "serving", "decode, eager, CPU time"


@dataclass(frozen=True)
class Scale:
    """H heads of D, E = D. ``decode`` has values of N. ``packings``: name, lengths, and whether they start from zero.

    ``drafts``: N, and how many each sequence has.
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
        H=64,
        D=128,
        dtype=torch.bfloat16,
        decode=(1, 8, 64, 256),
        packings=(
            ("8 equal prompts", (2048,) * 8, True),
            ("8 prompts, one long", (9000, 3001, 1700, 1100, 700, 500, 300, 83), True),
            ("2 chunks, 200 tokens", (4096,) * 2 + (1,) * 200, False),
        ),
        drafts=(64, 4),
        seconds=0.2,
    ),
    "cpu": Scale(
        H=4,
        D=64,
        dtype=torch.float32,
        decode=(1, 8),
        packings=(
            ("8 equal prompts", (128,) * 8, True),
            ("8 prompts, one long", (562, 189, 106, 69, 44, 31, 18, 5), True),
            ("2 chunks, 20 tokens", (256,) * 2 + (1,) * 20, False),
        ),
        drafts=(8, 4),
        seconds=0.1,
    ),
}


class Case:
    """A batch of random numbers, and what its outputs and states must be."""

    def __init__(self, scale: Scale, lengths: tuple[int, ...], state: torch.dtype, fresh: bool, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        N, T = len(lengths), sum(lengths)
        bounds = torch.tensor((0, *lengths), dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        # Drawn in float32 whatever it is kept in, so that q, k and v are the same for both types of state.
        pool = torch.randn(N, scale.H, scale.D, scale.D, generator=generator, device=device).to(state)
        q, k, v = (torch.randn(T, scale.H, scale.D, generator=generator, dtype=scale.dtype, device=device)
                   for _ in range(3))  # fmt: skip
        slots = torch.randperm(N, generator=generator, device=device, dtype=torch.int32)
        log_decay = decay.alibi(scale.H).to(device)
        self.batch = Batch(q, k, v, log_decay, pool, slots, bounds.to(device), fresh)
        self._heads = sorted({0, scale.H - 1})
        self._wanted = self._reference(lengths)

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

    def errors(self, output: Tensor | list[Tensor], states: Tensor) -> dict[str, float]:
        """Relative Frobenius errors.

        Raises:
            ArithmeticError: one is past its budget. 16 bits: the roundings of three operands and of the result make
                3e-3 of an output, kernels that add partial outputs in 16 bits somewhat more; a state is rounded once.
        """
        if isinstance(output, list):
            output = torch.stack(output, 1)
        output = output.view(self.batch.v.shape)
        wanted_output, wanted_states = self._wanted
        found = {
            "output_error": relative_error(output[:, self._heads], wanted_output),
            "state_error": relative_error(states[:, self._heads], wanted_states),
        }
        b = self.batch
        coarse = b.q.dtype.itemsize == 2
        budgets = (1e-2 if coarse else 1e-4, 5e-3 if coarse or b.pool.dtype.itemsize == 2 else 1e-4)
        for (name, error), budget in zip(found.items(), budgets, strict=True):
            if not error <= budget:
                raise ArithmeticError(f"{name} is {error:.1e}, and may be {budget:g}")
        return found


@torch.no_grad()
def serving(report: Report, servers: list[Server], scale: Scale, device: torch.device, say: Say) -> None:
    """Every case with every implementation that has it, into the report.

    ``copy_fraction`` is the time to move what the operation must read and write at the copy rate of this process,
    over the time taken. An implementation that fails, or whose numbers are not right, is recorded as an error and not
    timed.
    """
    rate = copy_rate(device)
    report.add("copy", bytes_per_second=rate)
    say(f"copy rate {rate / 1e12:.3f} TB/s")
    measure = _Measure(report, servers, scale, device, say, rate)
    for state in (torch.float32, torch.bfloat16):
        for N in scale.decode:
            measure(DECODE, f"N = {N}", (1,) * N, state=state)
    measure(HOST, "N = 1", (1,), case=DECODE)
    for name, lengths, fresh in scale.packings:
        measure(PREFILL, name, lengths, fresh=fresh)
    N, drafts = scale.drafts
    measure(SPECULATE, f"N = {N}, {drafts} drafts", (drafts,) * N)


@dataclass(frozen=True)
class _Measure:
    report: Report
    servers: list[Server]
    scale: Scale
    device: torch.device
    say: Say
    rate: float

    def __call__(
        self,
        what: str,
        size: str,
        lengths: tuple[int, ...],
        *,
        case: str | None = None,
        state: torch.dtype = torch.float32,
        fresh: bool = False,
    ) -> None:
        problem = Case(self.scale, lengths, state, fresh, self.device)
        able = [s for s in self.servers if (case or what) in s.binds and state in s.states]
        found: dict[str, dict[str, Any]] = {}
        calls: dict[str, Call] = {}
        for s in able:
            try:
                bound = s.binds[case or what](problem.batch)
                found[s.name] = _checked(problem, bound)
                calls[s.name] = bound.call if what == HOST else captured(bound.call, self.device)
            except Exception as error:  # a peer that is missing or broken is a result
                found[s.name] = {"error": _reason(error)}
        if what == HOST:
            for name, call in calls.items():
                found[name]["us"] = host_us(call, self.device)
        else:
            for name, timing in time_calls(calls, self.device, seconds=self.scale.seconds).items():
                found[name] |= asdict(timing)
                # Speculation is two operations, and the other ways to do it must move more; dense has no states.
                if what != SPECULATE and "state_error" in found[name]:
                    found[name]["copy_fraction"] = problem.bytes / self.rate / (timing.ms * 1e-3)
        row = {"what": what, "size": size, "N": len(lengths), "T": sum(lengths), "H": self.scale.H, "D": self.scale.D}
        types = {"dtype": _name(self.scale.dtype), "state": _name(state)}
        for s in able:
            record = self.report.add(SUITE, **row, **types, implementation=s.name, label=s.label, **found[s.name])
            self.say(f"{what:<24} {size:<20} {_name(state):<8} {s.label:<22} {_line(record)}")


def _checked(problem: Case, bound: Bound) -> dict[str, float]:
    output, states = bound.call(), bound.states()
    return {} if states is None else problem.errors(output, states)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(record: dict[str, Any]) -> str:
    if "error" in record:
        return str(record["error"])
    if "us" in record:
        return f"{record['us']:>9.1f} µs"
    part = f"{record['copy_fraction']:.2f} of the copy rate" if "copy_fraction" in record else ""
    return f"{record['ms'] * 1e3:>9.1f} µs   {part}"
