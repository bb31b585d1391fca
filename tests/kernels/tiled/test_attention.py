"""The tiled algorithm against the float64 recurrence: outputs, final states, and every gradient."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention.kernels.reference import attention as reference
from lightning_attention.kernels.tiled import attention as tiled
from lightning_attention.kernels.tiled import blocks, plan
from lightning_attention.kernels.tiled.plan import BLOCK, BUFFER
from tests.support import (
    Problem,
    budget,
    cumulative,
    make_problem,
    misses,
    problems,
    relative_error,
    solve_exactly,
    solve_with,
)

# A piece of one head is 1024 tokens: a token less, as many, one more, and more than two.
EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 2500]
assert BUFFER // BLOCK == 1024
# Blocks in a buffer: shorter pieces, so that short sequences meet their edges, of fewer heads.
SMALL = [BLOCK * BLOCK, 2 * BLOCK * BLOCK, 8 * BLOCK * BLOCK, BUFFER]


@settings(max_examples=4 * settings().max_examples)
@given(problems(), st.sampled_from(SMALL))
def test_any_sizes(problem: Problem, buffer: int):
    with patch.object(plan, "BUFFER", buffer):
        got = solve_with(problem, "tiled")
    assert not misses(got, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_over_a_thousand_tokens(dtype: torch.dtype):
    problem = make_problem(T=1000, H=2, D=64, dtype=dtype)
    expected, got = solve_exactly(problem), solve_with(problem, "tiled")
    for name in ("output", "final_state"):
        assert relative_error(getattr(got, name), getattr(expected, name)) <= budget(dtype), name
    for name in ("q", "k", "v", "log_decay", "initial_state"):
        assert relative_error(getattr(got, name), getattr(expected, name)) <= budget(dtype, gradient=True), name


MISTAKES: dict[str, Callable[[Problem], Problem]] = {
    "keys a token late": lambda p: replace(p, k=p.k.roll(1, 1)),
    "the first token decayed once more": lambda p: replace(p, initial_state=p.initial_state * 0.99),
    "decay off by a thousandth": lambda p: replace(p, log_decay=p.log_decay * 1.001),
    "a block forgotten": lambda p: replace(p, k=torch.cat([p.k[:, :64] * 0, p.k[:, 64:]], 1)),
    "heads swapped": lambda p: replace(p, log_decay=p.log_decay.flip(0)),
    "scale off by a hundredth": lambda p: replace(p, scale=p.scale * 1.01),
    "a sequence cut a token early": lambda p: replace(p, cu_seqlens=p.cu_seqlens - torch.tensor([0, 1, 0])),
    "states in half precision": lambda p: replace(p, initial_state=p.initial_state.bfloat16().float()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_budgets_notice(mistake: str):
    problem = make_problem(lengths=[70, 130], H=3, D=32, E=16)
    got = solve_with(MISTAKES[mistake](problem), "tiled")
    expected, magnitude = solve_exactly(problem), solve_exactly(problem.absolute())
    assert got.misses(expected, magnitude)
    assert not solve_with(problem, "tiled").misses(expected, magnitude)


@pytest.mark.parametrize("T", EDGES)
@pytest.mark.parametrize("kind", ["strong", "mixed"])
def test_strong_decay_at_the_edges_of_blocks_and_pieces(T: int, kind: str):
    problem = make_problem(T=T, H=5, D=4, E=3, kind=kind)
    expected, got = solve_with(problem, "reference"), solve_with(problem, "tiled")
    assert not got.misses(expected, solve_with(problem.absolute(), "tiled"))


@pytest.mark.parametrize("lengths", [[2048, 1], [5] * 40, [0, 0, 2100, 0, 7]])
def test_packed_sequences_across_pieces(lengths: list[int]):
    problem = make_problem(lengths=lengths, padding=3, H=2, D=4, E=3, kind="mixed")
    expected, got = solve_with(problem, "reference"), solve_with(problem, "tiled")
    assert not got.misses(expected, solve_with(problem.absolute(), "tiled"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_tokens_past_the_last_sequence_are_never_read(backend: str, bad: float):
    clean = make_problem(lengths=[70, 0, 60], padding=40, H=2, D=8)

    def poison(x: Tensor) -> Tensor:
        return torch.cat([x[:, :130], torch.full_like(x[:, 130:], bad)], 1)

    poisoned = replace(clean, **{name: poison(getattr(clean, name)) for name in ("q", "k", "v", "dout")})
    expected, got = solve_with(clean, backend), solve_with(poisoned, backend)
    for name in ("output", "final_state", "q", "k", "v", "log_decay", "initial_state"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("output", "q", "k", "v"):
        assert not getattr(got, name)[:, 130:].any(), name


PER_TOKEN = ("output", "q", "k", "v")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "initial_state", "dfinal"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("buffer", [SMALL[1], BUFFER])
@pytest.mark.parametrize("read", [True, False])
def test_one_sequence_does_not_poison_another(read: bool, buffer: int, packed: bool, name: str, bad: float):
    # The poisoned one ends in a partial block, with neighbours in its own piece; in short pieces it fills several.
    lengths = [100, 64, 230, 0, 1, 128]
    clean = make_problem(lengths=lengths, padding=5, D=8, E=6) if packed else make_problem(B=3, T=230, D=8, E=6)
    sequence = 2 if packed else 1
    start = sum(lengths[:sequence]) if packed else 0
    own = (slice(0, 1) if packed else slice(sequence, sequence + 1), slice(start, start + 230))
    x = getattr(clean, name).clone()
    if name in ("initial_state", "dfinal"):
        x[sequence] = bad
    else:
        x[own][:, 90] = bad
    # Without reading, as on other devices, what a block starts from is chosen by the tensors themselves.
    with patch.object(plan, "BUFFER", buffer), patch.object(blocks, "is_read", lambda _: read):
        expected = solve_with(clean, "tiled")
        got = solve_with(replace(clean, **{name: x}), "tiled")
    poisoned = 0
    for part in (*PER_TOKEN, "final_state", "initial_state"):
        want, have = getattr(expected, part).clone(), getattr(got, part).clone()
        place = own if part in PER_TOKEN else sequence
        poisoned += int(not have[place].isfinite().all())
        want[place] = have[place] = 0
        assert torch.equal(have, want), part
    assert poisoned


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("lengths", [None, [0], [0, 0, 0]])
def test_no_tokens(backend: str, lengths: list[int] | None):
    problem = make_problem(B=2, T=0, lengths=lengths, D=4, E=3)
    got = solve_with(problem, backend)
    assert got.output.numel() == got.q.numel() == 0
    assert torch.equal(got.final_state, problem.initial_state)
    assert torch.equal(got.initial_state, problem.dfinal)
    assert not got.log_decay.any()


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_only_padding(backend: str):
    problem = make_problem(lengths=[0, 0], padding=70, D=4, E=3)
    got = solve_with(problem, backend)
    assert not got.output.any()
    assert not got.k.any()
    assert torch.equal(got.final_state, problem.initial_state)


def test_results_are_not_the_arguments():
    """Autograd forbids an output that is an input, and a caller may write to either."""
    problem = make_problem(T=0)
    start = problem.initial_state.clone()
    got = solve_with(replace(problem, initial_state=start), "tiled")
    got.final_state.zero_()
    assert torch.equal(start, problem.initial_state)


def test_no_decay_is_a_decay_of_zero():
    without, zero = make_problem(T=200, kind="none"), make_problem(T=200, kind="zero")
    for name in ("output", "final_state", "q", "k", "v", "initial_state"):
        assert torch.equal(getattr(solve_with(without, "tiled"), name), getattr(solve_with(zero, "tiled"), name)), name


def test_cu_seqlens_of_either_type_and_of_equal_lengths_is_a_batch():
    dense = make_problem(B=3, T=100)
    expected = solve_with(dense, "tiled")
    for index_dtype in (torch.int32, torch.int64):
        flat = {name: getattr(dense, name).flatten(0, 1)[None] for name in ("q", "k", "v", "dout")}
        packed = replace(dense, cu_seqlens=cumulative([100] * 3, index_dtype), **flat)
        got = solve_with(packed, "tiled")
        assert relative_error(got.output.view_as(expected.output), expected.output) < 1e-6
        assert relative_error(got.k.view_as(expected.k), expected.k) < 1e-6
        assert relative_error(got.final_state, expected.final_state) < 1e-6


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_minus_infinity_is_no_memory(packed: bool, backend: str):
    """λ = 0: every token sees itself alone, and λ^0 is 1; so does finfo.min, whose products overflow."""
    kw = {"lengths": [70, 0, 60], "padding": 3} if packed else {"T": 130}
    none = torch.tensor([-torch.inf, torch.finfo(torch.float32).min])
    problem = replace(make_problem(D=8, E=6, **kw), log_decay=none)
    got = solve_with(problem, backend)
    finite = replace(problem, log_decay=torch.full((2,), -1e3))
    assert not misses(got, finite)
    assert not got.log_decay.any()


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_results_are_tensors_of_their_own(packed: bool, invariant: bool, backend: str):
    """No views: autograd forbids to change those in place. Contiguous, as the fake says, whatever came."""
    problem = make_problem(lengths=[70, 3] if packed else None, B=2, H=3, D=16, E=5)
    module = tiled if backend == "tiled" else reference
    state = problem.initial_state.mT.contiguous().mT
    args = (problem.q, problem.k, problem.v, problem.log_decay, state, problem.cu_seqlens, 1.0)
    with torch.no_grad():
        results = module.attention(*args, True, invariant)
        grads = module.attention_backward(problem.dout, problem.dfinal.mT.contiguous().mT, *args, invariant, True)
    for x in (*results, *grads):
        assert not x._is_view()
        assert x.is_contiguous()
        assert x.untyped_storage().nbytes() == x.numel() * x.itemsize


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_padding_behind_a_bad_token_is_zero(backend: str, bad: float):
    problem = make_problem(lengths=[20, 30], padding=9, D=4)
    v, dfinal = problem.v.clone(), problem.dfinal.clone()
    v[0, 45], dfinal[1] = bad, bad
    got = solve_with(replace(problem, v=v, dfinal=dfinal), backend)
    for x in (got.output, got.q, got.k, got.v):
        assert not x[:, 50:].any()


def test_a_float16_state_may_be_larger_than_float16():
    q = torch.full((1, 1, 1, 16), 1e-3, dtype=torch.float16)
    state = torch.full((1, 1, 16, 16), 1e5)
    problem = Problem(q, q * 0, q * 0, None, state, None, 1.0, q, torch.zeros_like(state))
    got = solve_with(problem, "tiled")
    assert not misses(got, problem)
    assert got.output.isfinite().all()
