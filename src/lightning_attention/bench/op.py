"""Time, memory and error of ``lightning_attention`` and its peers on one shape, and along the sequence length."""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention
from lightning_attention.bench.peers import Implementation
from lightning_attention.bench.report import Report
from lightning_attention.bench.timing import Call, peak_bytes, time_calls, wall_ms

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"

#: Tensors of B·T·H·D numbers that must be read or written: q k v o; q k v do dq dk dv.
FLOOR_UNITS = {FORWARD: 4, BACKWARD: 7, BOTH: 11}

#: What errors are taken of, in this order.
COMPARED = ("output", "dq", "dk", "dv")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """[B, T, H, D], with E = D."""

    B: int
    T: int
    H: int
    D: int

    def unit_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one such tensor."""
        return self.B * self.T * self.H * self.D * dtype.itemsize

    def floor_ms(self, pass_: str, dtype: torch.dtype, bytes_per_second: float) -> float:
        """Milliseconds to move what the definition reads and writes, once, at the given rate."""
        return FLOOR_UNITS[pass_] * self.unit_bytes(dtype) / bytes_per_second * 1e3

    def __str__(self) -> str:
        return f"{self.B}, {self.T}, {self.H}, {self.D}"


class Problem:
    """Random normal q, k, v and output gradient of a shape, with ALiBi decays."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.B, shape.T, shape.H, shape.D)
        self.tensors = [torch.randn(size, generator=generator, dtype=dtype, device=device) for _ in range(4)]
        self.log_decay = decay.alibi(shape.H).to(device)

    def call(self, implementation: Implementation, pass_: str) -> Call:
        """A call that runs one pass on tensors laid out as the implementation wants them."""
        forward, log_decay = implementation.load(), self.log_decay
        q, k, v, do = (x.transpose(1, 2).contiguous() if implementation.heads_first else x for x in self.tensors)
        if pass_ == FORWARD:
            return lambda: forward(q, k, v, log_decay)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        if pass_ == BACKWARD:
            out = forward(q, k, v, log_decay)
            return lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
        return lambda: torch.autograd.grad(forward(q, k, v, log_decay), (q, k, v), do)

    def reference(self) -> dict[str, Tensor]:
        """Output and gradients in float64, of the first and last head of the last sequence.

        By the tiled backend, which the tests hold against the recurrence: the recurrence itself would take minutes.
        The first head forgets fastest and the last slowest.
        """
        q, k, v, do = (self._slice(x).double() for x in self.tensors)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = lightning_attention(q, k, v, self.log_decay[self._heads()], backend="tiled").output
        return dict(zip(COMPARED, (out.detach(), *torch.autograd.grad(out, (q, k, v), do)), strict=True))

    def errors(self, implementation: Implementation, reference: dict[str, Tensor]) -> dict[str, float]:
        """Relative Frobenius errors of the implementation's output and gradients on the reference's slice."""
        forward = implementation.load()
        q, k, v, do = (x.transpose(1, 2).contiguous() if implementation.heads_first else x for x in self.tensors)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = forward(q, k, v, self.log_decay)
        found = [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]
        if implementation.heads_first:
            found = [x.transpose(1, 2) for x in found]
        pairs = zip(COMPARED, found, strict=True)
        return {name: relative_error(self._slice(x), reference[name]) for name, x in pairs}

    def _heads(self) -> list[int]:
        return sorted({0, self.shape.H - 1})

    def _slice(self, x: Tensor) -> Tensor:
        return x[-1:, :, self._heads()]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in the Frobenius norm, computed in float64."""
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def measure(
    implementations: list[Implementation], problem: Problem, pass_: str, *, seconds: float
) -> dict[str, dict[str, Any]]:
    """One pass of every implementation, timed in turns: a record each, or ``{"error": why}``.

    On a GPU they are timed one by one, because the tensors of all of them do not fit at the large shapes.
    """
    found: dict[str, dict[str, Any]] = {}
    device, shape = problem.device, problem.shape
    groups = [[i] for i in implementations] if device.type == "cuda" else [implementations]
    for group in groups:
        calls: dict[str, Call] = {}
        for i in group:
            try:
                call, first = problem.call(i, pass_), None
                if device.type == "cuda":  # compiling and autotuning, whose buffers are not the call's
                    first = wall_ms(call, device) * 1e-3
                found[i.name] = {"first_call_s": first, "peak_bytes": peak_bytes(call, device)}
                calls[i.name] = call
            except Exception as error:  # a peer that is missing, out of memory or broken is a result
                found[i.name] = {"error": _reason(error)}
        for name, timing in time_calls(calls, device, seconds=seconds).items():
            tokens = shape.B * shape.T
            found[name] |= asdict(timing) | {"us_per_token": timing.ms * 1e3 / tokens}
            found[name]["bytes_per_token"] = found[name]["peak_bytes"] / tokens
        calls.clear()
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return found


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


def _doublings(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << i for i in range((last // first).bit_length()))


#: On two cores the full sweep takes about four minutes and the quick one half a minute.
SWEEPS = {
    ("cpu", False): Sweep(_doublings(512, 65_536), 8, 64, torch.float32, tokens=1, limit_s=10, seconds=3),
    ("cpu", True): Sweep(_doublings(512, 16_384), 8, 64, torch.float32, tokens=1, limit_s=1, seconds=0.4),
    # 512 MB a tensor: a card with 24 GB runs it, and the smallest B·H still fills it.
    ("cuda", False): Sweep(_doublings(1024, 131_072), 16, 128, torch.bfloat16, 131_072, limit_s=1, seconds=0.5),
    ("cuda", True): Sweep(_doublings(1024, 32_768), 16, 128, torch.bfloat16, 32_768, limit_s=0.2, seconds=0.1),
}


def lengths(report: Report, implementations: list[Implementation], sweep: Sweep, device: torch.device, suite: str,
            say: Say) -> None:  # fmt: skip
    """Forward and forward+backward of every implementation, ours first, along the sweep, into the report."""
    before: dict[tuple[str, str], tuple[float, Shape]] = {}
    stopped: set[tuple[str, str]] = set()
    for T in sweep.lengths:
        shape = Shape(max(1, sweep.tokens // T), T, sweep.H, sweep.D)
        problem = Problem(shape, sweep.dtype, device)
        for pass_ in (FORWARD, BOTH):
            row = asdict(shape) | {"dtype": str(sweep.dtype).removeprefix("torch."), "pass": pass_}
            able = []
            for i in implementations:
                key = (i.name, pass_)
                if key in stopped:
                    continue
                expected = _expected_s(*before[key], shape, i.softmax) if key in before else 0.0
                if expected <= sweep.limit_s or i is implementations[0]:
                    able.append(i)
                    continue
                stopped.add(key)
                why = f"a call would take about {expected:.3g} s, more than {sweep.limit_s:g} s"
                report.add(suite, **row, implementation=i.name, label=i.label, skipped=why)
                say(f"T {T:>9,}  {pass_:<16}  {i.name:<20} skipped: {why}")
            for i, result in zip(able, measure(able, problem, pass_, seconds=sweep.seconds).values(), strict=True):
                report.add(suite, **row, implementation=i.name, label=i.label, **result)
                if "error" in result:
                    stopped.add((i.name, pass_))
                    say(f"T {T:>9,}  {pass_:<16}  {i.name:<20} {result['error']}")
                    continue
                before[i.name, pass_] = result["ms"], shape
                per_token = f"{result['us_per_token']:>9.4f} µs/token  {result['bytes_per_token']:>9,.0f} bytes/token"
                say(f"T {T:>9,}  {pass_:<16}  {i.name:<20} {result['ms']:>10.3f} ms  {per_token}")
        del problem


def _expected_s(ms: float, shape: Shape, next_shape: Shape, softmax: bool) -> float:
    growth = next_shape.B * next_shape.T / (shape.B * shape.T)
    return ms * 1e-3 * growth * (next_shape.T / shape.T if softmax else 1)
