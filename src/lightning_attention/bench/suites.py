"""What is measured on a GPU: the shapes of training, constant speed, packed batches, and the cost on the host."""

from dataclasses import asdict, replace
from typing import Any

import torch

from lightning_attention import lightning_attention
from lightning_attention.bench.op import (
    BACKWARD,
    BOTH,
    FORWARD,
    SWEEPS,
    Problem,
    Say,
    Shape,
    lengths,
    measure,
)
from lightning_attention.bench.peers import Implementation
from lightning_attention.bench.report import Report
from lightning_attention.bench.timing import Call, copy_rate, host_us, time_calls

SHAPES = (
    Shape(4, 32_768, 32, 128),
    Shape(4, 8_192, 32, 128),
    Shape(1, 131_072, 32, 128),
    Shape(1, 131_072, 8, 128),
    Shape(1, 524_288, 16, 64),
    Shape(4, 2_048, 32, 128),
    Shape(1, 2_048, 32, 128),
)

#: Softmax attention takes seconds a call past this length, and says nothing new.
SOFTMAX_MAX_LENGTH = 65_536

PACKED_TOKENS = 131_072


def shapes(
    report: Report,
    implementations: list[Implementation],
    device: torch.device,
    say: Say,
    *,
    cases: tuple[Shape, ...] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 0.4,
) -> None:
    """Each shape: forward, backward and both; the part of the floor reached; errors against float64 in the same run.

    ``floor_fraction`` is the time to move what the definition reads and writes at the copy rate of this process,
    divided by the time taken. ``memory_ratio`` is the peak of forward+backward, inputs and output gradient
    included, over the eight tensors q, k, v, o, do, dq, dk, dv.
    """
    rate = copy_rate(device)
    report.add("copy", bytes_per_second=rate)
    say(f"copy rate {rate / 1e12:.3f} TB/s")
    ours = implementations[0]
    for shape in cases:
        problem = Problem(shape, dtype, device)
        row = asdict(shape) | {"dtype": str(dtype).removeprefix("torch.")}
        reference = problem.reference()
        wanted = [i for i in implementations if not (i.softmax and shape.T > SOFTMAX_MAX_LENGTH)]
        for i in wanted:
            if not i.softmax:
                report.add("errors", **row, implementation=i.name, **_errors(problem, i, reference))
        del reference
        for pass_ in (FORWARD, BACKWARD, BOTH):
            chosen = [ours] if pass_ == BACKWARD else wanted
            for i, result in zip(chosen, measure(chosen, problem, pass_, seconds=seconds).values(), strict=True):
                if "error" not in result:
                    result["floor_fraction"] = shape.floor_ms(pass_, dtype, rate) / result["ms"]
                    if pass_ == BOTH:
                        unit = shape.unit_bytes(dtype)
                        result["memory_ratio"] = (result["peak_bytes"] + 4 * unit) / (8 * unit)
                report.add("shapes", **row, **{"pass": pass_}, implementation=i.name, label=i.label, **result)
                say(f"{shape!s:<20} {pass_:<16} {i.name:<20} {_line(result)}")
        del problem


def _errors(problem: Problem, implementation: Implementation, reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    try:
        return problem.errors(implementation, reference)
    except Exception as error:  # a peer that is missing or broken is a result
        return {"error": f"{type(error).__name__}: {error}"}


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    return f"{result['ms']:>9.4f} ms   {result['floor_fraction']:.2f} of the floor"


def constancy(report: Report, implementations: list[Implementation], device: torch.device, say: Say) -> None:
    """Time per token from T = 2,048 to 1,048,576 at B·T = 1,048,576, H = 16, D = 128."""
    lengths_ = tuple(2048 << i for i in range(10))
    sweep = replace(SWEEPS["cuda", False], lengths=lengths_, tokens=1 << 20, limit_s=0.5, seconds=0.3)
    lengths(report, implementations, sweep, device, "constancy", say)


def packings(tokens: int) -> dict[str, list[int]]:
    """Lengths that sum to ``tokens``: 16 equal ones; one of three quarters and 64 others; 32 drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def drawn(total: int, count: int) -> list[int]:
        order = torch.randperm(total - 1, generator=generator, device="cpu")
        cuts = (order[: count - 1] + 1).sort().values.tolist()
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]

    long = tokens * 3 // 4
    return {
        "uniform": [tokens // 16] * 16,
        "skewed": [*drawn(tokens - long, 64), long],
        "random": drawn(tokens, 32),
    }


def packed(
    report: Report,
    device: torch.device,
    say: Say,
    *,
    backend: str | None = None,
    tokens: int = PACKED_TOKENS,
    heads: tuple[int, ...] = (32, 8),
    D: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 0.4,
) -> None:
    """Packed batches against one dense sequence of as many tokens, and against 16 dense ones."""
    for H in heads:
        for dense in (Shape(1, tokens, H, D), Shape(16, tokens // 16, H, D)):
            name = f"dense {dense.B} × {dense.T}"
            _packed_case(report, say, Problem(dense, dtype, device), name, None, backend, seconds)
        for name, lengths_ in packings(tokens).items():
            bounds = torch.tensor([0, *lengths_], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
            _packed_case(report, say, Problem(Shape(1, tokens, H, D), dtype, device), name, bounds, backend, seconds)


def _packed_case(
    report: Report,
    say: Say,
    problem: Problem,
    name: str,
    cu_seqlens: torch.Tensor | None,
    backend: str | None,
    seconds: float,
) -> None:
    q, k, v, do = problem.tensors
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return lightning_attention(q, k, v, problem.log_decay, cu_seqlens=cu_seqlens, backend=backend).output

    calls: dict[str, Call] = {
        FORWARD: lambda: forward(q, k, v),
        BOTH: lambda: torch.autograd.grad(forward(*leaves), leaves, do),
    }
    for call in calls.values():
        call()
    sequences = problem.shape.B if cu_seqlens is None else cu_seqlens.numel() - 1
    for pass_, timing in time_calls(calls, problem.device, seconds=seconds).items():
        row = asdict(problem.shape) | {"packing": name, "sequences": sequences, "pass": pass_}
        report.add("packed", **row, **asdict(timing))
        say(f"H {problem.shape.H:>3}  {name:<18} {sequences:>4} sequences  {pass_:<16} {timing.ms:>9.4f} ms")


def host(report: Report, implementations: list[Implementation], device: torch.device, say: Say) -> None:
    """Microseconds of the calling thread for an eager call on a shape the device is done with at once."""
    problem = Problem(Shape(1, 64, 1, 64), torch.bfloat16, device)
    for i in implementations:
        for pass_ in (FORWARD, BOTH):
            try:
                call = problem.call(i, pass_)
                call()
                result: dict[str, Any] = {"us": host_us(call, device)}
            except Exception as error:  # a peer that is missing or broken is a result
                result = {"error": f"{type(error).__name__}: {error}"}
            report.add("host", **{"pass": pass_}, implementation=i.name, label=i.label, **result)
            say(f"host cost  {pass_:<16} {i.name:<20} " + result.get("error", f"{result.get('us', 0):.1f} µs"))
