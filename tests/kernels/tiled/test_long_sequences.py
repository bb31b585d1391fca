"""Slow decays over long sequences: roundings of λ must not add up in one direction, and float32 keeps its budget."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention
from lightning_attention.kernels.tiled.decode import decode
from lightning_attention.kernels.tiled.prefill import prefill
from lightning_attention.kernels.tiled.speculative import commit
from tests.support import Problem, budget, cumulative, make_problem, relative_error, solve_with

SLOW = decay.transnormer(8, 23, 24)[[0, 7]]  # transnormer's last layer: −5e-6 and −4e-8


def _in_float64(problem: Problem) -> Problem:
    values = {f.name: getattr(problem, f.name) for f in fields(problem)}
    return replace(problem, **{n: x.double() for n, x in values.items() if isinstance(x, Tensor) and n != "cu_seqlens"})


@pytest.mark.parametrize("invariant", [False, True])
def test_the_last_layer_of_transnormer(invariant: bool):
    problem = replace(make_problem(T=65_536, D=8), log_decay=SLOW)
    got = solve_with(problem, "tiled", batch_invariant=invariant)
    expected = solve_with(_in_float64(problem), "tiled")
    assert relative_error(got.output, expected.output) <= budget(torch.float32)
    for head in range(2):
        error = relative_error(got.final_state[:, head], expected.final_state[:, head])
        assert error <= budget(torch.float32)
    for name in ("q", "k", "v", "log_decay", "initial_state"):
        error = relative_error(getattr(got, name), getattr(expected, name))
        assert error <= budget(torch.float32, gradient=True), name


# With batch_invariant the sums of a state are one chain, rounded at every block.
@pytest.mark.parametrize(("invariant", "budgets"), [(False, 1), (True, 2.5)])
def test_a_million_tokens(invariant: bool, budgets: float):
    q, k, v = torch.randn(3, 1, 1 << 20, 1, 2).unbind()
    options = {"output_final_state": True, "batch_invariant": invariant, "backend": "tiled"}
    got = lightning_attention(q, k, v, SLOW[:1], **options)
    exact = lightning_attention(q.double(), k.double(), v.double(), SLOW[:1].double(), **options)
    for a, b in zip(got, exact, strict=True):
        assert relative_error(a, b) <= budgets * budget(torch.float32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("T", "rate"), [(32_768, -1.4e-4), (32_768, -3e-6), (1 << 20, -3e-6)])
def test_a_state_that_only_fades(T: int, rate: float, packed: bool):
    zeros, start = torch.zeros(1, T, 1, 2), torch.randn(1, 1, 2, 2)
    log_decay = torch.tensor([rate])
    cuts = torch.tensor([0, T]) if packed else None
    final = lightning_attention(
        zeros, zeros, zeros, log_decay, initial_state=start, output_final_state=True, cu_seqlens=cuts, backend="tiled"
    ).final_state
    assert relative_error(final, start.double() * (log_decay.double() * T).exp()) <= budget(torch.float32)


def test_decoding_sixteen_thousand_tokens():
    T, rate, start = 1 << 14, torch.tensor([-1.4e-4]), torch.randn(1, 1, 2, 2)
    k, v = torch.randn(2, 1, T, 1, 2)
    pool = start.clone()
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        decode(key, key, value, rate, pool, None, 1.0, False)
    exact = [x.double() for x in (k, k, v, rate)]
    expected = lightning_attention(
        *exact, initial_state=start.double(), output_final_state=True, backend="tiled"
    ).final_state
    # A rounding of the state a token, of which the last 1 / 1.4e-4 are there to be seen.
    assert relative_error(pool, expected) <= 2 * budget(torch.float32)


def test_many_small_prefills_commits_and_snapshots():
    """A rounding a call, each in its own direction."""
    rate, calls = torch.tensor([-1.4e-4]), 600
    start = torch.randn(1, 1, 2, 2)
    zeros, cuts = torch.zeros(4, 1, 2), torch.tensor([0, 4])
    prefilled, committed, shots = start.clone(), start.clone(), start.repeat(2, 1, 1, 1)
    for i in range(calls):
        prefill(zeros, zeros, zeros, rate, prefilled, cuts, None, None, 1.0, None, None, False)
        commit(zeros, zeros, rate, committed, cuts, torch.ones(4, dtype=torch.bool), None)
        # From one row to the other, and back.
        own, other = torch.tensor([i % 2]), torch.tensor([[1 - i % 2]])
        prefill(zeros, zeros, zeros, rate, shots, cuts, own, None, 1.0, torch.tensor([[4]]), other, False)
    expected = start.double() * (rate.double() * 4 * calls).exp()
    for got in (prefilled, committed, shots[:1]):
        assert relative_error(got, expected) <= budget(torch.float32)


def test_packed_sequences_are_carried_as_exactly():
    lengths = [30_000, 5, 40_000]
    problem = replace(make_problem(lengths=lengths, D=4), log_decay=SLOW)
    got, expected = solve_with(problem, "tiled"), solve_with(_in_float64(problem), "tiled")
    assert torch.equal(problem.cu_seqlens, cumulative(lengths))
    for name in ("output", "final_state", "initial_state"):
        assert relative_error(getattr(got, name), getattr(expected, name)) <= budget(torch.float32), name
