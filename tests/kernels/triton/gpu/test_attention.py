"""The kernels on the GPU that is here, against float64 on the same GPU and the same inputs.

Every kernel variant costs seconds of compilation, so most problems share their sizes and differ in what costs nothing:
lengths, decays, numbers of heads.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention import decay, lightning_attention
from tests.kernels.triton.support.device import (
    DEVICE,
    misses,
    moved,
    needs_gpu,
    poisoned,
    room_for,
    solve,
    solve_in_float64,
)
from tests.support import Problem, Solution, cumulative, make_problem, relative_error, solve_exactly, solve_with
from tests.support.problem import DECAYS

pytestmark = needs_gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def test_the_oracle():
    problem = make_problem(lengths=[0, 130, 65, 1], padding=20, D=24, dtype=torch.float64, kind="mixed")
    expected, magnitude = solve_exactly(problem), solve_exactly(problem.absolute())
    got = solve_in_float64(problem)
    on_cpu = replace(got, **{name: x.cpu() for name, x in vars(got).items() if x is not None})
    assert not on_cpu.misses(expected, magnitude)


PACKED = [0, 1, 64, 0, 636, 1, 2199, 100]
CASES = {
    "128": {"B": 2, "T": 1000, "H": 4, "D": 128},
    "128, segments": {"T": 20_011, "H": 1, "D": 128},
    "128, packed": {"lengths": PACKED, "padding": 100, "H": 64, "D": 128},
    "128, packed, segments": {"lengths": [11_000, 0, 8_999], "padding": 11, "H": 2, "D": 128},
    "128, no decay, no initial state": {"B": 2, "T": 500, "D": 128, "kind": "none", "initial": False},
    "80 and 96": {"B": 2, "T": 777, "H": 4, "D": 80, "E": 96},
    "64": {"B": 2, "T": 1000, "H": 4, "D": 64},
    "64, packed, segments": {"lengths": [11_000, 0, 8_999], "D": 64, "index_dtype": torch.int32},
    "16": {"B": 3, "T": 200, "H": 8, "D": 16},
    "20, which the copy engine cannot address": {"B": 2, "T": 333, "H": 3, "D": 20},
    "20, packed, segments": {"lengths": [5_000, 0, 3_999], "padding": 1, "H": 1, "D": 20},
    "128, half precision": {"B": 2, "T": 1000, "H": 4, "D": 128, "dtype": FP16},
    "48 and 64, half precision, packed": {"lengths": PACKED, "padding": 9, "H": 2, "D": 48, "E": 64, "dtype": FP16},
    "192 and 256": {"T": 600, "D": 192, "E": 256},
    "256 and 128, packed": {"lengths": PACKED, "padding": 100, "H": 8, "D": 256, "E": 128},
    "256, half precision, segments": {"T": 9_000, "H": 1, "D": 256, "dtype": FP16},
    "136 and 72, packed, segments": {"lengths": [5_000, 0, 3_999], "padding": 1, "H": 1, "D": 136, "E": 72},
    "160, half precision, packed": {"lengths": PACKED, "padding": 9, "H": 2, "D": 160, "dtype": FP16},
    "128 and 328, segments": {"T": 9000, "H": 2, "D": 128, "E": 328},
    "192 and 300, packed": {"lengths": PACKED, "padding": 9, "D": 192, "E": 300},
    "128, fewer heads of q and k": {"B": 2, "T": 1000, "H": 8, "Hk": 2, "D": 128},
    "64 and 128, one head of q and k, packed, segments": {
        "lengths": [11_000, 0, 8_999],
        "H": 4,
        "Hk": 1,
        "D": 64,
        "E": 128,
    },
    "20, fewer heads of q and k, float32": {"T": 333, "H": 4, "Hk": 2, "D": 20, "dtype": FP32},
    "64, float32": {"B": 2, "T": 1000, "H": 4, "D": 64, "dtype": FP32},
    "64 and 192, float32": {"T": 500, "H": 2, "D": 64, "E": 192, "dtype": FP32},
    "128, float32": {"T": 500, "D": 128, "dtype": FP32},
    "80 and 96, fewer heads of q and k, float32, packed": {
        "lengths": PACKED,
        "padding": 9,
        "H": 4,
        "Hk": 2,
        "D": 80,
        "E": 96,
        "dtype": FP32,
    },
    "128 and 64, float32, segments": {"T": 20_011, "H": 1, "D": 128, "E": 64, "dtype": FP32},
}


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str):
    problem = make_problem(**{"dtype": BF16, **CASES[case]})
    assert not misses(solve(problem), solve_in_float64(problem))


SHORT = [1] * 100 + [7] * 200 + [0, 64, 64, 0, 128, 500, 1, 2199, 100]
DOCUMENTS = {
    "128": {"lengths": SHORT, "padding": 100, "H": 8, "D": 128},
    "128, segments": {"lengths": [*SHORT, 11_000, *SHORT], "padding": 3_000, "H": 1, "D": 128},
    "128, nothing forgotten, segments": {"lengths": [7] * 900, "H": 2, "D": 128, "kind": "zero"},
    "64": {"lengths": SHORT, "H": 4, "D": 64, "index_dtype": torch.int32},
    "80 and 96": {"lengths": SHORT, "padding": 9, "H": 4, "D": 80, "E": 96},
    "256 and 128": {"lengths": SHORT, "padding": 100, "H": 8, "D": 256, "E": 128},
    "20, which the copy engine cannot address": {"lengths": SHORT, "padding": 100, "H": 3, "D": 20},
    "128, half precision": {"lengths": SHORT, "padding": 100, "H": 4, "D": 128, "dtype": FP16},
    "64, float32": {"lengths": SHORT, "padding": 100, "H": 4, "D": 64, "dtype": FP32},
    "128, float32, segments": {"lengths": [*SHORT, 11_000], "padding": 3_000, "H": 1, "D": 128, "dtype": FP32},
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_parted_by_masks(case: str):
    """Packed batches whose states nobody has or wants, and NaN in the padding."""
    clean = make_problem(**{"dtype": BF16, "initial": False, **DOCUMENTS[case]})
    expected = solve_in_float64(replace(clean, dfinal=torch.zeros_like(clean.dfinal)))
    problem = moved(clean)
    last = problem.cu_seqlens[-1]
    for x in (problem.q, problem.k, problem.v, problem.dout):
        x[:, last:] = float("nan")
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v, problem.log_decay)]
    with poisoned():
        out, _ = lightning_attention(*leaves, cu_seqlens=problem.cu_seqlens, backend="triton")
        grads = torch.autograd.grad(out, leaves, problem.dout)
    assert not misses(Solution(out.detach(), expected.final_state, *grads, None), expected)


@pytest.fixture
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_tf32")
def test_float32_with_tf32():
    problem = make_problem(B=2, T=1000, H=4, D=64)
    got, expected = solve(problem), solve_in_float64(problem)
    assert not misses(got, expected)
    assert relative_error(got.output, expected.output) > 1e-6  # as asked for, and not float32's


FIXED = {
    "64": {"B": 2, "T": 1000, "H": 4, "D": 64},
    "128": {"B": 2, "T": 777, "H": 4, "Hk": 2, "D": 128},
    "128, segments": {"T": 20_011, "H": 1, "D": 128},
    "80 and 96, packed": {"lengths": PACKED, "padding": 9, "H": 4, "D": 80, "E": 96},
    "128, documents": {"lengths": [*SHORT, 11_000], "padding": 3_000, "H": 2, "D": 128, "initial": False},
    "64 and 128, documents": {"lengths": SHORT, "H": 4, "D": 64, "E": 128, "initial": False},
    "128, one token": {"B": 2, "T": 1, "D": 128, "kind": "strong"},
}


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("case", FIXED)
def test_float32_where_decays_are_fixed(case: str, precision: str, monkeypatch: pytest.MonkeyPatch):
    """On Hopper another sweep goes back than where they have a gradient; without states, documents are masks."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    problem = make_problem(**FIXED[case])
    has_state = problem.initial_state is not None
    if not has_state:
        problem = replace(problem, dfinal=torch.zeros_like(problem.dfinal))
    expected, there = solve_in_float64(problem), moved(problem)
    leaves = [x.requires_grad_() for x in (there.q, there.k, there.v, there.initial_state) if x is not None]
    with poisoned():
        out, final = lightning_attention(
            *leaves[:3], there.log_decay, initial_state=there.initial_state, output_final_state=has_state,
            cu_seqlens=there.cu_seqlens, backend="triton",
        )  # fmt: skip
        results, given = ([out, final], [there.dout, there.dfinal]) if has_state else ([out], [there.dout])
        dq, dk, dv, *dinitial = torch.autograd.grad(results, leaves, given)
    final = final.detach() if has_state else expected.final_state
    got = Solution(out.detach(), final, dq, dk, dv, expected.log_decay, *(dinitial or [None]))
    assert not misses(got, expected)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_strong_decay_at_the_edges_of_blocks(dtype: torch.dtype):
    for T in (1, 2, 63, 64, 65, 127, 128, 129, 1000):
        problem = make_problem(T=T, D=128, kind="strong", dtype=dtype, seed=T)
        assert not misses(solve(problem), solve_in_float64(problem)), T


def test_strong_decay_packed():
    problem = make_problem(lengths=[1, 63, 64, 65, 0, 129, 127], padding=3, D=128, kind="strong", dtype=BF16)
    assert not misses(solve(problem), solve_in_float64(problem))


LENGTH = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]), st.integers(0, 1500))


@settings(max_examples=30)
@given(
    arguments=st.fixed_dictionaries(
        {
            "B": st.integers(1, 2),
            "T": st.one_of(LENGTH, st.integers(1500, 3000)),
            "H": st.integers(1, 5),
            "D": st.sampled_from([104, 112, 128]),  # and E: the widths that share their kernels
            "E": st.sampled_from([104, 120, 128]),
            "kind": st.sampled_from([kind for kind in DECAYS if kind != "none"]),
            "lengths": st.one_of(st.none(), st.lists(LENGTH, min_size=1, max_size=5)),
            "padding": st.integers(0, 70),
            "scale": st.sampled_from([1.0, 0.125, -2.0]),
            "seed": st.integers(0, 2**16),
            "index_dtype": st.sampled_from([torch.int32, torch.int64]),
        }
    ),
    batch_invariant=st.booleans(),
)
def test_any_lengths(arguments: dict[str, Any], batch_invariant: bool):
    problem = make_problem(**arguments, dtype=BF16)
    got, expected = solve(problem, batch_invariant=batch_invariant), solve_in_float64(problem)
    # Of few tokens the gradient of a decay can be a sum that ends near zero: it is held to the size of its terms.
    assert not misses(replace(got, log_decay=expected.log_decay), expected)
    size = solve_in_float64(problem.absolute()).log_decay
    assert (got.log_decay - expected.log_decay).norm() <= 1e-2 * expected.log_decay.norm() + 1e-3 * size.norm()


def test_a_nan_in_the_padding_and_in_other_sequences_stays_there():
    clean = make_problem(lengths=[100, 333, 70], padding=60, D=128, dtype=BF16)
    expected = solve(clean)

    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 433:], x[:, :100] = float("nan"), float("inf")
        return x

    dirty = replace(clean, **{name: spoil(getattr(clean, name)) for name in ("q", "k", "v", "dout")})
    got = solve(dirty)
    for name in ("output", "q", "k", "v"):
        assert torch.equal(getattr(got, name)[:, 100:433], getattr(expected, name)[:, 100:433]), name
        assert not getattr(got, name)[:, 503:].any(), name
    for name in ("final_state", "initial_state"):
        assert torch.equal(getattr(got, name)[1], getattr(expected, name)[1]), name


def test_only_padding_and_no_tokens():
    for lengths, padding in (([0, 0], 70), ([0], 0), (None, 0)):
        problem = moved(make_problem(B=2, T=0, lengths=lengths, padding=padding, D=128, dtype=BF16))
        got = solve(problem)
        assert not any(getattr(got, name).any() for name in ("output", "q", "k", "v", "log_decay"))
        assert torch.equal(got.final_state, problem.initial_state)
        assert torch.equal(got.initial_state, problem.dfinal)


def random_problem(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Problem:
    """Made on the GPU and in parts: a tensor can have more than 2^31 elements."""

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        x = torch.empty(shape, dtype=of, device=DEVICE)
        for part in x.split(2**16, 1):
            part.normal_()
        return x

    return Problem(
        *(normal(B, T, H, D) for _ in "qkv"),
        decay.alibi(H).to(DEVICE),
        normal(B, H, D, D, of=FP32),
        None,
        1.0,
        normal(B, T, H, D),
        normal(B, H, D, D, of=FP32),
    )


FULL = [(4, 2048, 32, 128), (4, 8192, 32, 128), (1, 131_072, 8, 128), (1, 131_072, 16, 64)]


@pytest.mark.parametrize(("B", "T", "H", "D"), FULL)
def test_whole_shapes(B: int, T: int, H: int, D: int):
    room_for(B * T * H * D * 8 * 20 / 1e9)
    problem = random_problem(B, T, H, D, BF16)
    got = solve_with(problem, "triton")
    assert not misses(got, solve_in_float64(problem))


REACH = 6144  # tokens: the slowest of ALiBi's decays, 2^-8, leaves 4e-11


def _windows(T: int, H: int, D: int) -> list[slice]:
    """Tokens at both ends, and around each where an element's number is a multiple of 2^31."""
    edges = range(2**31 // (H * D), T, 2**31 // (H * D))
    return [slice(0, 500), *(slice(e - 250, min(e + 250, T)) for e in edges), slice(T - 500, T)]


def _around(problem: Problem, window: slice) -> tuple[Problem, slice]:
    """The window with all that reaches it, as a problem of its own, and where it is in that."""
    T = problem.q.shape[1]
    begin, end = max(window.start - REACH, 0), min(window.stop + REACH, T)
    parts = {name: getattr(problem, name)[:, begin:end] for name in ("q", "k", "v", "dout")}
    states = {
        "initial_state": problem.initial_state * (begin == 0),
        "dfinal": problem.dfinal * (end == T),
    }
    return replace(problem, **parts, **states), slice(window.start - begin, window.stop - begin)


@pytest.mark.parametrize(("T", "H", "D", "dtype"), [(4_000_037, 16, 128, BF16), (1_100_003, 32, 64, FP32)])
def test_forward_past_two_billion_elements(T: int, H: int, D: int, dtype: torch.dtype):
    room_for((4 if dtype == BF16 else 5) * T * H * D * dtype.itemsize / 1e9 + 8)
    p = random_problem(1, T, H, D, dtype)
    p = replace(p, dout=p.q)  # for the memory: no gradient is computed
    with poisoned():
        out, final = lightning_attention(
            p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state, output_final_state=True, backend="triton"
        )
    tolerance = 4e-3 if dtype == BF16 else 1e-5
    for window in _windows(T, H, D):
        part, where = _around(p, window)
        expected = solve_in_float64(part)
        assert relative_error(out[:, window], expected.output[:, where]) < tolerance, window
    assert relative_error(final, expected.final_state) < tolerance / 2  # the last window ends where the sequence does


@pytest.mark.parametrize("packed", [False, True])
def test_backward_past_two_billion_elements(packed: bool):
    T, H, D = 1_100_003, 16, 128
    room_for(9 * T * H * D * 2 / 1e9 + 8)
    p = random_problem(1, T, H, D, BF16)
    if packed:  # two sequences, of which the first has 1,000 tokens
        p = replace(p, cu_seqlens=cumulative([1000, T - 1000]).to(DEVICE))
        p = replace(p, initial_state=p.initial_state.repeat(2, 1, 1, 1), dfinal=p.dfinal.repeat(2, 1, 1, 1))
    got = solve(p)
    last = replace(p, cu_seqlens=None, initial_state=p.initial_state[-1:], dfinal=p.dfinal[-1:])
    for window in _windows(T, H, D)[packed:]:
        part, where = _around(last, window)
        expected = solve_in_float64(part)
        for name in ("output", "q", "k", "v"):
            assert relative_error(getattr(got, name)[:, window], getattr(expected, name)[:, where]) < 4e-3, (
                name,
                window,
            )
    assert relative_error(got.final_state[-1:], expected.final_state) < 2e-3
    if not packed:
        first, _ = _around(p, slice(0, 500))
        assert relative_error(got.initial_state, solve_in_float64(first).initial_state) < 4e-3
