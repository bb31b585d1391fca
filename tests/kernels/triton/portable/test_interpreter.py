"""The portable kernels, interpreted on the CPU, against the closed form in float64.

Interpreting costs a second or three a problem, nearly whatever its size: few problems, each of many features.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention import lightning_attention
from tests.kernels.triton.support.cutting import chunk_of
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.support import (
    Problem,
    Solution,
    cumulative,
    make_problem,
    misses,
    problems,
    relative_error,
    solve_exactly,
    solve_with,
)

pytestmark = interpreted
NAN = float("nan")
ARRAYS = ("q", "k", "v", "dout")


def padded_with(value: float, problem: Problem) -> Problem:
    """The problem with ``value`` in every row past the last sequence, which nobody may read."""
    assert problem.cu_seqlens is not None
    last = int(problem.cu_seqlens[-1])

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x[:, :last], torch.full_like(x[:, last:], value)], 1)

    return replace(problem, **{name: pad(getattr(problem, name)) for name in ARRAYS})


PACKED = {"lengths": [0, 130, 0, 70, 1, 65, 0], "padding": 40}


def _called(problem: Problem) -> Solution:
    return solve_with(problem, "triton")


def _refused(dtype: torch.dtype) -> str:
    q = torch.zeros(1, 2, 1, 16, dtype=dtype)
    with pytest.raises(TypeError) as caught:
        lightning_attention(q, q, q, backend="triton")
    return str(caught.value)


def test_the_public_function_has_the_backend_where_it_is_interpreted(interpreter: Interpreter):
    problem = make_problem(T=70, D=20, E=17)
    assert misses(interpreter.call(_called, problem), problem) == {}
    with pytest.raises(ValueError, match=r"q is on cpu; it needs a CUDA or ROCm device, or Triton's interpreter"):
        _called(problem)  # here it is not


def test_what_the_interpreter_computes_wrong_is_refused(interpreter: Interpreter):
    message = interpreter.call(_refused, torch.bfloat16)
    assert message == "q has dtype bfloat16; Triton's interpreter, which multiplies it wrong, takes float16 and float32"


SOLVED = {
    "dense": {"B": 2, "T": 150, "D": 24, "E": 16},
    "half precision, odd widths": {"B": 2, "T": 150, "D": 48, "E": 20, "dtype": torch.float16, "scale": 0.125},
    "half precision, more than a tile": {"T": 130, "H": 1, "D": 20, "E": 100, "dtype": torch.float16},
    "more than a tile of keys": {"T": 40, "H": 1, "D": 80, "E": 17, "scale": -2.0},
    "forgotten at once": {"T": 150, "H": 1, "kind": "strong"},
    "no decay": {"T": 150, "D": 20, "kind": "none"},
    "decays of every strength": {"T": 100, "H": 5, "kind": "mixed"},
    "fewer heads of q and k": {"T": 70, "H": 4, "Hk": 2, "D": 20, "E": 17},
    "packed": {**PACKED, "index_dtype": torch.int32},
    "packed, a segment and a half each": {"lengths": [104, 104, 104], "kind": "none"},
    "packed, half precision, forgotten at once": {**PACKED, "kind": "strong", "D": 17, "dtype": torch.float16},
    "one token": {"T": 1},
}


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("case", SOLVED)
def test_against_the_closed_form(interpreter: Interpreter, case: str, segments: bool):
    problem = make_problem(**SOLVED[case])
    run = interpreter.solve(problem if problem.cu_seqlens is None else padded_with(NAN, problem), segments=segments)
    assert not misses(run.solution, problem)
    assert run.scans == (2 if segments and case != "one token" else 0)  # one in each pass


@pytest.mark.parametrize("segments", [False, True])
def test_more_columns_than_the_gradients_of_q_and_k_take_at_once(interpreter: Interpreter, segments: bool):
    problem = make_problem(T=40, H=1, E=260)
    run = interpreter.solve(problem, segments=segments)
    assert not misses(run.solution, problem)
    assert run.scans == (4 if segments else 0)  # one forward, and one for each part of the columns


@st.composite
def interpretable(draw: st.DrawFn) -> Problem:
    """NumPy has no bfloat16, and the kernels have no float64."""
    problem, dtype = draw(problems(max_tokens=100)), draw(st.sampled_from([torch.float32, torch.float16]))
    names = ("log_decay", "initial_state", "dfinal")
    states = {name: x.float() for name in names for x in [getattr(problem, name)] if x is not None}
    return replace(problem, **{name: getattr(problem, name).to(dtype) for name in ARRAYS}, **states)


@settings(max_examples=6)
@given(problem=interpretable(), segments=st.booleans(), batch_invariant=st.booleans())
def test_any_sizes(interpreter: Interpreter, problem: Problem, segments: bool, batch_invariant: bool):
    assert not misses(interpreter.solve(problem, segments=segments, batch_invariant=batch_invariant).solution, problem)


MISTAKES: dict[str, Callable[[Problem], Problem]] = {
    "a segment forgotten": lambda p: replace(p, k=torch.cat([p.k[:, :64] * 0, p.k[:, 64:]], 1)),
    "keys a token late": lambda p: replace(p, k=p.k.roll(1, 1)),
    "decay off by a thousandth": lambda p: replace(p, log_decay=p.log_decay * 1.001),
    "heads swapped": lambda p: replace(p, log_decay=p.log_decay.flip(0)),
    "a sequence cut a token early": lambda p: replace(p, cu_seqlens=p.cu_seqlens - torch.tensor([0, 1, 0])),
    "the gradient of the final state lost": lambda p: replace(p, dfinal=p.dfinal * 0),
}


def test_the_budgets_notice(interpreter: Interpreter):
    problem = make_problem(lengths=[70, 130], D=32)
    got = interpreter.solve(problem, segments=True).solution
    assert not misses(got, problem)
    for mistake, make in MISTAKES.items():
        assert misses(got, make(problem)), mistake


@pytest.mark.parametrize("lengths", [None, [0, 0]])
def test_no_tokens(interpreter: Interpreter, lengths: list[int] | None):
    problem = make_problem(B=2, T=0, lengths=lengths)
    got = interpreter.solve(problem).solution
    assert got.output.numel() == got.q.numel() == 0
    assert torch.equal(got.final_state, problem.initial_state)
    assert torch.equal(got.initial_state, problem.dfinal)
    assert not got.log_decay.any()


def test_only_padding(interpreter: Interpreter):
    problem = padded_with(NAN, make_problem(lengths=[0, 0], padding=70))
    got = interpreter.solve(problem, segments=True).solution
    assert not any(getattr(got, name).any() for name in ("output", "q", "k", "v", "log_decay"))
    assert torch.equal(got.final_state, problem.initial_state)
    assert torch.equal(got.initial_state, problem.dfinal)


@pytest.mark.parametrize("initial", [False, True])
def test_without_final_states(interpreter: Interpreter, initial: bool):
    problem = make_problem(T=150, initial=initial)
    problem = replace(problem, dfinal=torch.zeros_like(problem.dfinal))
    expected, magnitude = solve_exactly(problem), solve_exactly(problem.absolute())
    for segments in (False, True):
        got = interpreter.solve(problem, segments=segments, final=False).solution
        assert not replace(got, final_state=expected.final_state).misses(expected, magnitude)


# Blocks have 16 rows, and 64 in half precision; segments, two blocks; sums for log_decay, groups of 512 rows.
DOCUMENTS = {
    "of 1 and of 7 tokens": {"lengths": [1] * 5 + [7] * 12, "padding": 9, "D": 20, "E": 24, "scale": -2.0},
    "borders at edges, longer than a segment": {"lengths": [0, 16, 16, 0, 32, 5, 27, 64, 3, 70, 0], "padding": 40},
    "half precision": {"lengths": [64, 64, 7, 57, 200, 1], "padding": 9, "D": 17, "dtype": torch.float16, "scale": 0.1},
    "half precision, any decay": {"lengths": [7] * 20, "H": 5, "E": 20, "dtype": torch.float16, "kind": "mixed"},
    "half precision, groups": {"lengths": [512, 400, 188, 1], "padding": 9, "H": 1, "dtype": torch.float16},
    "one, and segments of padding": {"lengths": [50], "padding": 90, "H": 1, "kind": "none"},
}


def without_states(problem: Problem) -> Problem:
    return replace(problem, initial_state=None, dfinal=torch.zeros_like(problem.dfinal))


def misses_without_states(got: Solution, problem: Problem) -> dict[str, float]:
    expected, magnitude = solve_exactly(problem), solve_exactly(problem.absolute())
    return replace(got, final_state=expected.final_state).misses(expected, magnitude)


@pytest.mark.parametrize("rate", [-0.0775, -0.1])
def test_a_decay_learns_from_distant_pairs_where_there_are_no_others(interpreter: Interpreter, rate: float):
    """One key and one token with a loss, blocks apart: nothing nearer hides what is lost between them."""
    problem = without_states(make_problem(T=192, H=1, D=16, dtype=torch.float16))
    k, dout = torch.zeros_like(problem.k), torch.zeros_like(problem.dout)
    k[:, 63], dout[:, 128] = problem.k[:, 63], problem.dout[:, 128]
    problem = replace(problem, k=k, dout=dout, log_decay=torch.tensor([rate]))
    got = interpreter.solve(problem, final=False).solution.log_decay
    assert relative_error(got, solve_exactly(problem).log_decay) < 5e-3


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_parted_by_masks(interpreter: Interpreter, case: str, segments: bool):
    """Packed batches whose states nobody has or wants."""
    problem = without_states(make_problem(**DOCUMENTS[case]))
    run = interpreter.solve(padded_with(NAN, problem), segments=segments, final=False)
    assert not misses_without_states(run.solution, problem)
    assert run.scans == 2 * segments


@pytest.mark.parametrize("segments", [False, True])
def test_a_nan_reaches_no_document_that_has_no_token_in_its_block(interpreter: Interpreter, segments: bool):
    """Blocks have 16 rows: the second document shares its first and last with the others, and not its third."""
    clean = without_states(make_problem(lengths=[20, 55, 30]))
    arrays = {name: getattr(clean, name).clone() for name in ARRAYS}
    for x in arrays.values():
        x[:, 40] = NAN
    got = interpreter.solve(replace(clean, **arrays), segments=segments, final=False).solution
    expected = interpreter.solve(clean, segments=segments, final=False).solution
    for name in PER_TOKEN:
        for document in (slice(0, 20), slice(75, 105)):
            assert torch.equal(getattr(got, name)[:, document], getattr(expected, name)[:, document]), name
    assert got.output[:, 40:75].isnan().all()


def _borders(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    from lightning_attention.kernels.triton.plan import plan_documents
    from lightning_attention.kernels.triton.tiling import tiling

    x = torch.empty(1, T, 1, 16)
    plan = plan_documents(cu_seqlens, T, 16, tiling(x, x, x), 1, True)
    return plan.begins, plan.ends


@pytest.mark.parametrize("lengths", [[], [0, 0], [300], [0, 1, 255, 0, 256, 3, 0], [3] * 200 + [0] * 90])
def test_borders_of_documents(interpreter: Interpreter, lengths: list[int]):
    lengths = [*lengths, 5]  # the last: padding
    cuts = cumulative(lengths)
    expected = cuts[:-1], cuts[1:]
    got = interpreter.call(_borders, cuts[:-1], sum(lengths))
    for borders, of_documents in zip(got, expected, strict=True):
        assert torch.equal(borders[:-1].long(), of_documents.repeat_interleave(torch.tensor(lengths)))
    assert got[0][-1] == cuts[-2]  # how many rows have a document


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("case", [PACKED, {"B": 2, "T": 140, "H": 1, "D": 20}])
def test_states(interpreter: Interpreter, case: dict[str, object], segments: bool, reverse: bool):
    """What sequences leave by themselves, and with time reversed."""
    problem = replace(make_problem(**case), scale=1.0)
    got = interpreter.states(
        padded_with(NAN, problem) if "lengths" in case else problem, segments=segments, reverse=reverse
    )
    if reverse:  # the gradient of the initial state, where nothing comes after
        problem = replace(problem, q=problem.k, dout=problem.v, dfinal=torch.zeros_like(problem.dfinal))
        expected = solve_exactly(problem).initial_state
    else:
        expected = solve_exactly(replace(problem, initial_state=torch.zeros_like(problem.dfinal))).final_state
    assert relative_error(got, expected) < 1e-6


def _views(p: Problem) -> dict[str, Problem]:
    """The same numbers in other places: each has a unit last stride, as the operation asks for."""
    qkv = torch.stack([p.q, p.k, p.v], 2)
    turned = {name: getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "dout")}
    wider = {name: torch.cat([getattr(p, name)] * 2, 3)[..., : p.q.shape[3]] for name in ("k", "v")}
    states = {name: getattr(p, name).mT.contiguous().mT for name in ("initial_state", "dfinal")}
    return {
        "parts of a packed projection": replace(p, q=qkv[:, :, 0], k=qkv[:, :, 1], v=qkv[:, :, 2]),
        "heads before tokens, parts of wider heads, states transposed": replace(p, **turned, **wider, **states),
    }


def test_views_need_no_copy(interpreter: Interpreter):
    problem = make_problem(B=2, T=70, D=24)
    expected = interpreter.solve(problem, segments=True).solution
    for view, same in _views(problem).items():
        got = interpreter.solve(same, segments=True).solution
        for field in fields(Solution):
            assert torch.equal(getattr(got, field.name), getattr(expected, field.name)), (view, field.name)


def test_the_gradient_of_a_sum(interpreter: Interpreter):
    """Autograd hands over one number seen as a tensor, every stride 0."""
    problem = make_problem(T=70, D=24)
    problem = replace(problem, dout=torch.ones(()).expand(problem.v.shape))
    assert not misses(interpreter.solve(problem).solution, problem)


PER_TOKEN, PER_SEQUENCE = ("output", "q", "k", "v"), ("final_state", "initial_state")


def _tokens(problem: Problem, part: slice, **changes: Tensor | None) -> Problem:
    return replace(problem, **{name: getattr(problem, name)[:, part] for name in ARRAYS}, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_invariance(interpreter: Interpreter, dtype: torch.dtype):
    """A sequence whose last segment is more than a piece, and one that ends where a segment does."""
    chunk = chunk_of(dtype)
    cut = 2 * chunk + 3 * chunk // 4
    whole = make_problem(lengths=[cut, chunk], H=1, D=20, dtype=dtype)
    packed = interpreter.solve(whole, segments=True, batch_invariant=True)
    assert packed.scans == 2
    for n, own in enumerate([slice(cut), slice(cut, cut + chunk)]):
        states = {name: getattr(whole, name)[n : n + 1] for name in ("initial_state", "dfinal")}
        alone = _tokens(whole, own, cu_seqlens=None, **states)
        expected = interpreter.solve(alone, segments=True, batch_invariant=True).solution
        for name in PER_TOKEN:
            assert torch.equal(getattr(packed.solution, name)[:, own], getattr(expected, name)), (n, name)
        for name in PER_SEQUENCE:
            assert torch.equal(getattr(packed.solution, name)[n : n + 1], getattr(expected, name)), (n, name)
