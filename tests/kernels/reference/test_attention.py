"""The float64 recurrence, by hand, against its closed form, and its derivatives."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_attention import lightning_attention
from lightning_attention.kernels.reference.attention import recurrence
from tests.support import Problem, make_problem, misses, problems, relative_error, solve_exactly, solve_with


def test_two_tokens_by_hand():
    # D = 2, E = 1, λ = 1/2, S_0 = (1, 2)ᵀ, scale 10
    q = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64).view(1, 2, 1, 2)
    v = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    log_decay = torch.tensor([math.log(0.5)], dtype=torch.float64)
    start = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 1, 2, 1)
    out, final = lightning_attention(
        q, k, v, log_decay, scale=10.0, initial_state=start, output_final_state=True, backend="reference"
    )
    # S_1 = (1/2, 1) + 3 (1, 1) = (3.5, 4);  o_1 = 10 · 3.5
    # S_2 = (1.75, 2) + 5 (0, 2) = (1.75, 12);  o_2 = 10 · 13.75
    assert out.flatten().tolist() == pytest.approx([35.0, 137.5], rel=1e-15)
    assert final.flatten().tolist() == pytest.approx([1.75, 12.0], rel=1e-15)


def test_gradients_by_hand():
    # D = E = 1, λ = 1/2, one sequence of two tokens from S_0 = 4: loss = o_2 = q_2 (λ² S_0 + λ k_1 v_1 + k_2 v_2)
    leaves = [
        torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1).requires_grad_() for x in ([7.0, 2.0], [3.0, 5.0], [1, 6])
    ]
    log_decay = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    start = torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64, requires_grad=True)
    out = lightning_attention(*leaves, log_decay, initial_state=start, backend="reference").output
    dq, dk, dv, dlog_decay, dstart = torch.autograd.grad(out[0, 1], [*leaves, log_decay, start])
    assert dq.flatten().tolist() == pytest.approx([0, 1 + 1.5 + 30])
    assert dk.flatten().tolist() == pytest.approx([2 * 0.5 * 1, 2 * 6])
    assert dv.flatten().tolist() == pytest.approx([2 * 0.5 * 3, 2 * 5])
    assert dlog_decay.item() == pytest.approx(2 * (2 * 0.25 * 4 + 0.5 * 3))
    assert dstart.item() == pytest.approx(2 * 0.25)


def _arguments(problem: Problem) -> tuple[Tensor | None, ...]:
    return problem.q, problem.k, problem.v, problem.log_decay, problem.initial_state


@given(problems(max_tokens=130))
def test_recurrence_is_its_closed_form(problem: Problem):
    """Forward, and the backward written by hand, against automatic differentiation of the closed form."""
    got = solve_with(problem, "reference")
    assert not misses(got, problem)


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("kind", ["none", "alibi", "strong"])
def test_quadratic_form_is_the_recurrence(kind: str, initial: bool):
    problem = make_problem(B=2, T=70, H=3, D=5, E=4, dtype=torch.float64, kind=kind, initial=initial, scale=0.5)
    out, _ = recurrence(*_arguments(problem), None, 0.5)
    closed = solve_exactly(problem).output
    assert relative_error(closed, out) < 1e-13
    assert relative_error(closed.roll(1, 1), out) > 0.1


def test_backward_is_that_of_autograd_through_the_recurrence():
    problem = make_problem(lengths=[3, 0, 9], padding=2, H=2, D=3, E=4, dtype=torch.float64, kind="mixed")
    leaves = [x.requires_grad_() for x in _arguments(problem)]
    got = torch.autograd.grad(recurrence(*leaves, problem.cu_seqlens, 1.0), leaves, (problem.dout, problem.dfinal))
    by_hand = solve_with(problem, "reference")
    for name, expected in zip(("q", "k", "v", "log_decay", "initial_state"), got, strict=True):
        assert relative_error(getattr(by_hand, name), expected) < 1e-13, name
