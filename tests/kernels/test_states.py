"""The states that sequences leave from zero on a CPU's backends, forward and reversed, against the sum in float64."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention.kernels.backend import Backend
from lightning_attention.kernels.reference.backend import BACKEND as REFERENCE
from lightning_attention.kernels.tiled import blocks, plan
from lightning_attention.kernels.tiled.backend import BACKEND as TILED
from tests.support import Problem, budget_used, make_problem, problems, relative_error

BACKENDS = pytest.mark.parametrize("backend", [TILED, REFERENCE], ids=lambda backend: backend.name)


def expected(problem: Problem, reverse: bool) -> Tensor:
    k, v = problem.k.double(), problem.v.double()
    k = k.repeat_interleave(v.shape[2] // k.shape[2], 2)
    rate = torch.zeros(v.shape[2]) if problem.log_decay is None else problem.log_decay
    found = []
    for b, tokens in problem.sequences():
        age = torch.arange(tokens.stop - tokens.start, dtype=torch.float64)
        weight = (rate.double() * (age + 1 if reverse else age.flip(0))[:, None]).exp()
        found.append(torch.einsum("th,thd,the->hde", weight, k[b, tokens], v[b, tokens]))
    return torch.stack(found)


def states_of(backend: Backend, problem: Problem, reverse: bool, batch_invariant: bool = False) -> Tensor:
    return backend.states(problem.k, problem.v, problem.log_decay, problem.cu_seqlens, reverse, batch_invariant)


@BACKENDS
@given(problem=problems(), reverse=st.booleans(), invariant=st.booleans())
def test_any_sizes(backend: Backend, problem: Problem, reverse: bool, invariant: bool):
    got = states_of(backend, problem, reverse, invariant)
    wanted, magnitude = expected(problem, reverse), expected(problem.absolute(), reverse)
    assert got.dtype == torch.promote_types(problem.k.dtype, torch.float32)
    # The sums are float32 whatever the inputs are.
    assert budget_used(got, wanted, magnitude, got.dtype) <= 1
    assert got.is_contiguous()
    assert got.untyped_storage().nbytes() == got.numel() * got.itemsize


WRONG: dict[str, Callable[[Problem, bool], Tensor]] = {
    "the other direction": lambda p, reverse: expected(p, not reverse),
    "decayed once more": lambda p, reverse: expected(p, reverse) * p.log_decay.double().exp()[:, None, None],
    "sequences in the other order": lambda p, reverse: expected(p, reverse).flip(0),
}


@BACKENDS
@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("reverse", [False, True])
def test_mistakes_are_noticed(reverse: bool, mistake: str, backend: Backend):
    problem = make_problem(lengths=[70, 0, 130, 3], padding=2)
    got = states_of(backend, problem, reverse)
    assert relative_error(got, expected(problem, reverse)) <= 1e-6
    assert relative_error(got, WRONG[mistake](problem, reverse)) > 1e-2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kw", [{"B": 2, "T": 700, "H": 3}, {"lengths": [300, 1, 0, 400], "padding": 9}])
def test_tiled_in_short_pieces_and_without_reading_lengths(kw: dict, reverse: bool):
    problem = make_problem(D=8, E=6, **kw)
    with patch.object(plan, "BUFFER", plan.BLOCK * plan.BLOCK * 2), patch.object(blocks, "is_read", lambda _: False):
        got = states_of(TILED, problem, reverse)
    assert relative_error(got, expected(problem, reverse)) <= 1e-6


@BACKENDS
@pytest.mark.parametrize("reverse", [False, True])
def test_no_memory_is_one_token(reverse: bool, backend: Backend):
    """λ = 0 and λ^0 = 1: the last token is left, and reversed, where every token decays, none."""
    problem = make_problem(B=2, T=130, D=8, E=6)
    none = torch.tensor([-torch.inf, torch.finfo(torch.float32).min])
    got = backend.states(problem.k, problem.v, none, None, reverse, False)
    if reverse:
        assert not got.any()
        return
    assert relative_error(got, problem.k[:, -1, :, :, None].double() * problem.v[:, -1, :, None, :].double()) <= 1e-6


@BACKENDS
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_sequence_does_not_poison_another(bad: float, reverse: bool, backend: Backend):
    clean, poisoned = (make_problem(lengths=[70, 100, 5], padding=40) for _ in range(2))
    poisoned.k[0, 90] = poisoned.v[0, 175:] = bad
    want, got = states_of(backend, clean, reverse), states_of(backend, poisoned, reverse)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert not got[1].isfinite().all()


@pytest.mark.parametrize("H", [1, 5])
def test_tiled_batch_invariance(H: int):
    """The bits of a sequence's state do not depend on the others, nor on where it lies."""
    own, other = (make_problem(T=200, H=H, D=5, E=7, seed=seed) for seed in (0, 1))
    for reverse in (False, True):
        alone = states_of(TILED, own, reverse, True)
        k, v = (torch.cat([getattr(other, n)[:, :100], getattr(own, n)], 1) for n in ("k", "v"))
        packed = TILED.states(k, v, own.log_decay, torch.tensor([0, 100, 300]), reverse, True)
        assert torch.equal(packed[1], alone[0])
