"""The functions of ``lightning_attn``: ours against float64 and, where the package is installed, against its own."""

import inspect
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightning_attention.integrations import lightning_attn as ours
from tests.kernels.triton.support.device import DEVICE, needs_gpu
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.support import relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 1e-2, FP16: 2e-3, FP32: 3e-6}

#: B, H, T, D, E of the package's own tests
GRID = [
    *[(6, 8, T, 128, 64) for T in (256, 512, 1024, 2048, 4096, 8192, 913, 513, 1213)],
    *[(6, 8, 2048, D, 64) for D in (16, 32, 64)],
    *[(6, H, 2048, 128, 64) for H in (12, 16, 20)],
    *[(B, 8, 2048, 128, 64) for B in (1, 2, 3)],
]
SMALL = [(1, 3, 63, 16, 16), (2, 3, 114, 128, 64), (1, 2, 151, 64, 48), (1, 2, 70, 192, 32)]

Results = list[Tensor]


def make(B: int, H: int, T: int, D: int, E: int, dtype: torch.dtype = FP32) -> Results:
    """Q, k, v, and what is multiplied by the output."""
    return [torch.randn(B, H, T, size).to(dtype) / 4 for size in (D, D, E, E)]


def run(function: str, module: ModuleType, tensors: Results, slopes: Tensor | None) -> Results:
    q, k, v = leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    decays = () if slopes is None else (slopes,)
    out = getattr(module, function)(q, k, v, *decays)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, tensors[3]))]


def exactly(tensors: Results, slopes: Tensor | None) -> Results:
    """A head at a time: the weights of all would not fit."""
    heads = [
        _of_a_head([x[:, head : head + 1] for x in tensors], None if slopes is None else slopes[head : head + 1])
        for head in range(tensors[0].shape[1])
    ]
    return [torch.cat(parts, 1) for parts in zip(*heads, strict=True)]


def _of_a_head(tensors: Results, slopes: Tensor | None) -> Results:
    q, k, v, dout = (x.double() for x in tensors)
    q, k, v = leaves = [x.requires_grad_() for x in (q, k, v)]
    place = torch.arange(q.shape[2], device=q.device).double()
    rate = torch.zeros(q.shape[1], 1, 1, device=q.device) if slopes is None else slopes
    weight = (-rate.double() * (place[:, None] - place).clamp(min=0)).exp().tril()
    out = (q @ k.mT * weight) @ v
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, dout))]


def check(got: Results, wanted: Results, tolerance: float) -> None:
    assert max(relative_error(a, b) for a, b in zip(got, wanted, strict=True)) <= tolerance


def absent() -> None:
    if find_spec("lightning_attn") is None:
        pytest.skip("lightning_attn is not installed")


def theirs(module: str = "ops") -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"lightning_attn.{module}")


FUNCTIONS = [("lightning_attn_func", True), ("lightning_attn2", True), ("lightning_attn2_no_decay", False)]
functions = pytest.mark.parametrize(("function", "decays"), [*FUNCTIONS, ("lightning_attn_func", False)])


@functions
@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_against_float64(function: str, decays: bool, sizes: tuple[int, ...], dtype: torch.dtype):
    tensors, slopes = make(*sizes, dtype=dtype), ours._build_slope_tensor(sizes[1]) if decays else None
    check(run(function, ours, tensors, slopes), exactly(tensors, slopes), TOLERANCE[dtype])


def test_the_check_notices():
    tensors, slopes = make(*SMALL[1]), ours._build_slope_tensor(3)
    for wrong in (None, slopes * 1.001, slopes.flip(0)):
        with pytest.raises(AssertionError):
            check(run("lightning_attn_func", ours, tensors, wrong), exactly(tensors, slopes), TOLERANCE[FP32])


def _interpreted(function: str, tensors: Results, slopes: Tensor | None) -> Results:
    torch.use_deterministic_algorithms(False)
    return run(function, theirs(), tensors, slopes)


@interpreted
@pytest.mark.parametrize(("function", "decays"), FUNCTIONS)
def test_the_packages_own_agrees(interpreter: Interpreter, function: str, decays: bool):
    """Also for lengths that are not a multiple of its block of 64; it does not compute a width of 16."""
    absent()
    for T in (64, 100):
        tensors, slopes = make(1, 2, T, 32, 64), ours._build_slope_tensor(2) if decays else None
        check(interpreter.call(_interpreted, function, tensors, slopes), run(function, ours, tensors, slopes), 3e-6)


def test_the_packages_formula_agrees():
    absent()
    tensors, slopes = make(2, 3, 70, 16, 32), ours._build_slope_tensor(3)
    check(run("linear_attn", theirs(), tensors, slopes), run("lightning_attn_func", ours, tensors, slopes), 3e-6)


@pytest.mark.parametrize("H", [1, 8, 12, 20])
def test_its_slopes(H: int):
    absent()
    torch.testing.assert_close(ours._build_slope_tensor(H), theirs("utils")._build_slope_tensor(H))


def test_its_signature():
    absent()
    mine, its = (inspect.signature(m.lightning_attn_func).parameters.values() for m in (ours, theirs()))
    assert [(x.name, x.kind, x.default) for x in mine] == [(x.name, x.kind, x.default) for x in its]


def test_rows_that_are_not_dense():
    tensors, slopes = make(*SMALL[0]), ours._build_slope_tensor(3)
    apart = [x.mT.contiguous().mT for x in tensors[:3]]
    assert apart[0].stride(-1) != 1
    assert torch.equal(ours.lightning_attn_func(*apart, slopes), ours.lightning_attn_func(*tensors[:3], slopes))


@pytest.mark.parametrize("which", range(4))
def test_an_argument_that_is_wrong_is_named(which: int):
    arguments = [*make(*SMALL[0])[:3], ours._build_slope_tensor(3)]
    name, given = "qkvs"[which], arguments[which]
    arguments[which] = [1.0]
    with pytest.raises(TypeError, match=f"^{name} is a list; it must be a tensor"):
        ours.lightning_attn_func(*arguments)
    if name != "s":
        for arguments[which] in (given[0, 0, 0], given[0, 0, 0, 0]):
            with pytest.raises(ValueError, match=rf"^{name} has shape .*; it must be \[B, H, T, "):
                ours.lightning_attn_func(*arguments)


def test_slopes_that_are_none_are_named():
    q, k, v, _ = make(*SMALL[0])
    for shape in ((3, 1), (1, 3, 1), (), (2,), (3, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"^s has shape .*; it must be \[H, 1, 1\] or \[H\], with H = 3"):
            ours.lightning_attn_func(q, k, v, torch.ones(shape))
    with pytest.raises(TypeError, match=r"^s has dtype uint8; it must be of floating point"):
        ours.lightning_attn_func(q, k, v, torch.ones(3, dtype=torch.uint8))


@pytest.mark.gpu
@needs_gpu[1]
@pytest.mark.parametrize("sizes", GRID, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_grid_of_its_tests(sizes: tuple[int, ...], dtype: torch.dtype):
    tensors = [x.to(DEVICE) for x in make(*sizes, dtype=dtype)]
    slopes = ours._build_slope_tensor(sizes[1]).to(DEVICE)
    got = run("lightning_attn_func", ours, tensors, slopes)
    for row in range(sizes[0]):
        wanted = exactly([x[row : row + 1] for x in tensors], slopes)
        check([x[row : row + 1] for x in got], wanted, TOLERANCE[dtype])
    if find_spec("lightning_attn") is not None:
        check(run("lightning_attn2", theirs(), tensors, slopes), got, 2e-2)
