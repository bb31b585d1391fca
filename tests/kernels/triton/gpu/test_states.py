"""The states that sequences leave by themselves, on a GPU, forward and with time reversed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention.kernels.triton.states import states
from tests.kernels.triton.support.device import DEVICE, allowed, moved, needs_gpu, poisoned
from tests.support import Problem, make_problem, relative_error

pytestmark = needs_gpu

CASES: dict[str, dict[str, Any]] = {
    "whole sequences": {"B": 8, "T": 300, "H": 16, "D": 64},
    "split": {"B": 1, "T": 20_000, "H": 2, "D": 128},
    "split, more columns than a program has": {"B": 1, "T": 9000, "H": 2, "D": 256, "E": 192},
    "split, many columns": {"B": 1, "T": 9000, "H": 2, "D": 128, "E": 320},
    "fewer heads of k": {"B": 1, "T": 9000, "H": 4, "Hk": 2, "D": 64},
    "packed": {"lengths": [0, 700, 1, 64, 0, 5000, 63], "padding": 100, "H": 3, "D": 128},
    "packed, one split": {"lengths": [70_000, 5, 0, 16_384, 900], "H": 2, "D": 128},
    "odd widths": {"B": 2, "T": 777, "H": 2, "D": 40, "E": 24},
    "no token": {"B": 2, "T": 0, "H": 2, "D": 64},
}


def expected(problem: Problem, reverse: bool) -> Tensor:
    """Token by token in chunks, float64."""
    k, v = problem.k.to(DEVICE).double(), problem.v.to(DEVICE).double()
    k = k.repeat_interleave(v.shape[2] // k.shape[2], 2)
    rate = problem.log_decay.to(DEVICE).double()
    found = []
    for b, tokens in problem.sequences():
        age = torch.arange(tokens.stop - tokens.start, dtype=torch.float64, device=DEVICE)
        weight = ((age + 1 if reverse else age.flip(0))[:, None] * rate).exp()
        found.append(torch.einsum("th,thd,the->hde", weight, k[b, tokens], v[b, tokens]))
    return torch.stack(found)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, dtype: torch.dtype, reverse: bool):
    problem = make_problem(dtype=dtype, **CASES[case])
    given = moved(problem)
    for batch_invariant in (False, True):
        with poisoned():
            got = states(given.k, given.v, given.log_decay, given.cu_seqlens, reverse, batch_invariant)
        assert got.shape == (len(list(problem.sequences())), *problem.dfinal.shape[1:])
        wanted = expected(problem, reverse)
        if not problem.k.shape[1]:
            assert not got.any()
            continue
        assert relative_error(got, wanted) <= allowed("final_state", dtype)
        assert relative_error(got, expected(problem, not reverse)) > 0.1
