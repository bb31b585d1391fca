"""Problems on a GPU: solved there, exactly and with the kernels, and how far the two may differ."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.support import Problem, Solution, budget, relative_error, solve_with

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
DEVICE = "cuda"
GRADIENTS = ("q", "k", "v", "initial_state", "log_decay")


def moved(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    """The problem on the GPU; with a dtype every floating tensor in it."""

    tensors = {f.name: getattr(problem, f.name) for f in fields(problem)}
    return replace(
        problem,
        **{
            name: x.to(DEVICE, dtype if x.is_floating_point() and dtype else x.dtype)
            for name, x in tensors.items()
            if isinstance(x, Tensor)
        },
    )


def solve_in_float64(problem: Problem) -> Solution:
    """The plain PyTorch backend in float64, on the GPU; ``test_the_oracle`` holds it to the closed form."""
    return solve_with(moved(problem, torch.float64), "tiled")


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, or of the largest integer: what nobody writes, or should not read, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def solve(problem: Problem, **options: bool) -> Solution:
    """With the kernels, in poisoned memory."""
    problem = moved(problem)
    with poisoned():
        return solve_with(problem, "triton", **options)


def allowed(name: str, dtype: torch.dtype) -> float:
    """Relative Frobenius error.

    16 bits: three operands of the products are rounded, and the result; 4e-3 is two units of bfloat16's roundoff.
    The sum that log_decay's is cancels, and leaves more of its terms' errors than of the terms.
    TF32 cuts off 13 bits of both operands, of one product after another: 3.5e-4 each on the average.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return budget(dtype, gradient=name in GRADIENTS)
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2.5e-3}[dtype]
    return {"final_state": 0.5, "log_decay": 16.0}.get(name, 1.0) * tolerance


def misses(got: Solution, expected: Solution) -> dict[str, float]:
    """Errors past what is allowed."""
    dtype, errors = got.output.dtype, {}
    for field in fields(Solution):
        actual, exact = getattr(got, field.name), getattr(expected, field.name)
        assert (actual is None) == (exact is None), field.name
        if exact is not None:
            error = relative_error(actual, exact)
            if not error <= allowed(field.name, dtype):
                errors[field.name] = error
    return errors


def assert_same_bits(got: Solution, expected: Solution, *names: str) -> None:
    for name in names or [f.name for f in fields(Solution)]:
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b), name


def assert_recorded_calls_repeat(run: Callable[[int], list[Tensor]]) -> None:
    """Calls made again from a recording give the bits of those that were not, from the tensors of a seed."""
    first = [run(0), run(1)]  # nothing is recorded before a shape comes for the second time
    kept = []
    for _ in range(3):
        for seed in (0, 1):
            found = run(seed)
            kept.append(found)  # so that the next gets other memory
            assert all(map(torch.equal, found, first[seed]))


def room_for(gigabytes: float) -> None:
    """Skip where the GPU has less memory free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"{free:.0f} GB of GPU memory are free, and this takes {gigabytes:.0f}")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let what waits for the device raise RuntimeError."""
    try:
        with warnings.catch_warnings():  # PyTorch warns, the first time, that it does not notice everything
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """The names of the kernels that Triton compiles."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    compile_one = JITFunction._do_compile

    def count(kernel: JITFunction, *args: object, **kwargs: object) -> object:
        names.append(kernel.fn.__name__)
        return compile_one(kernel, *args, **kwargs)

    with patch.object(JITFunction, "_do_compile", count):
        yield names
