"""Slices of sequences on several ranks, by the portable kernels, interpreted: against the whole in float64."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.kernels.triton.support.cutting import cutting
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.slices import Cut, solve_in_slices
from tests.support import Problem, Solution, make_problem, misses, solve_exactly

pytestmark = interpreted

PACKED = ((20, 0, 3), (50, 0, 40), (0, 1, 45))
CASES: dict[str, tuple[dict[str, Any], Cut]] = {
    "dense, a slice without tokens": ({"B": 2, "T": 70, "D": 20, "kind": "none"}, (20, 0, 50)),
    "more columns than the gradients of q and k take at once": ({"T": 40, "H": 1, "E": 260}, (5, 35)),
    "packed": ({"lengths": [70, 1, 88], "Hk": 1, "scale": 0.5, "index_dtype": torch.int32}, PACKED),
    "packed, no initial state": ({"lengths": [70, 1, 88], "H": 1, "initial": False}, PACKED),
}


def _solve(
    problem: Problem, cut: Cut, final: bool, segments: bool, batch_invariant: bool
) -> tuple[Solution, list[str]]:
    from lightning_attention.kernels.triton.backend import BACKEND
    from lightning_attention.kernels.triton.scan import scan_kernel

    events: list[str] = []
    functions = BACKEND.sequence_parallel, BACKEND.sequence_parallel_backward
    hooks = patch.object(scan_kernel, "pre_run_hooks", [lambda *_, **__: events.append("scan")])
    with cutting(segments, problem.q.dtype), hooks:
        return solve_in_slices(problem, cut, final, batch_invariant, *functions, events)


@pytest.mark.parametrize(("case", "segments"), [*((case, True) for case in CASES), ("packed", False)])
def test_slices_agree_with_the_whole(interpreter: Interpreter, case: str, segments: bool):
    kw, cut = CASES[case]
    problem, final = make_problem(**kw), case != "packed, no initial state"
    if not final:
        problem = replace(problem, dfinal=torch.zeros_like(problem.dfinal))
    got, events = interpreter.call(_solve, problem, cut, final, segments, case == "packed")
    expected = solve_exactly(problem)
    if not final:
        expected = replace(expected, final_state=got.final_state)
    assert not got.misses(expected, solve_exactly(problem.absolute()))
    if "columns" in case:
        return
    forward, backward = ["start", "wait"], ["start, to go on", "wait"]
    if segments:  # what the slice leaves is of the one pass over k and v; a scan needs nothing from elsewhere backward
        forward, backward = ["scan", *forward], ["scan", backward[0], "scan", "wait"]
    assert events == [*forward, *backward]


def test_the_budgets_notice(interpreter: Interpreter):
    problem = make_problem(T=70)
    got, _ = interpreter.call(_solve, problem, (20, 50), True, True, False)
    shifted = replace(problem, log_decay=problem.log_decay * 1.001)
    assert not misses(got, problem)
    assert misses(got, shifted)
