"""Slices of sequences on several ranks, on one GPU: against the whole in float64, and calls made from a recording."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_attention import decay, lightning_attention
from lightning_attention.kernels.triton.sequence_parallel import sequence_parallel, sequence_parallel_backward
from tests.kernels.triton.support.device import (
    assert_recorded_calls_repeat,
    misses,
    moved,
    needs_gpu,
    poisoned,
    solve_in_float64,
)
from tests.kernels.triton.support.slices import Cut, solve_in_slices
from tests.support import make_problem

pytestmark = needs_gpu

CASES: dict[str, tuple[dict[str, Any], Cut]] = {
    "split": ({"T": 24_000, "H": 2, "D": 128}, (9000, 0, 15_000)),
    "split, no decay": ({"T": 24_000, "H": 2, "D": 128, "kind": "none"}, (9000, 15_000)),
    "not split": ({"B": 8, "T": 700, "H": 32, "D": 64, "scale": 0.25}, (300, 1, 399)),
    "fewer heads of q and k": ({"T": 9000, "H": 4, "Hk": 2, "D": 128}, (4000, 5000)),
    "more columns than the gradients of q and k take at once": ({"T": 9000, "H": 2, "D": 64, "E": 320}, (5000, 4000)),
    "packed": ({"lengths": [20_700, 1, 964], "H": 3, "D": 128}, ((700, 0, 64), (20_000, 1, 0), (0, 0, 900))),
}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, batch_invariant: bool):
    kw, cut = CASES[case]
    problem = make_problem(dtype=torch.bfloat16, **kw)
    with poisoned():
        got, _ = solve_in_slices(
            moved(problem), cut, True, batch_invariant, sequence_parallel, sequence_parallel_backward, []
        )
    assert not misses(got, solve_in_float64(problem))


@pytest.fixture
def group(tmp_path) -> Iterator[dist.ProcessGroup]:
    """An NCCL group with this process alone."""
    own = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, device_id=own)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("T", [4096, 300])
def test_a_recorded_call_has_the_bits_of_the_first(group: dist.ProcessGroup, T: int, states: bool):
    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        q, k, v, dout = (torch.randn(1, T, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        initial, dfinal = (torch.randn(1, 4, 64, 64, device="cuda") for _ in range(2))
        inputs = [x.requires_grad_() for x in (q, k, v, initial)[: 3 + states]]
        found = lightning_attention(
            q, k, v, decay.alibi(4).cuda(), initial_state=initial if states else None, output_final_state=states,
            group=group,
        )  # fmt: skip
        outputs = [x for x in found if x is not None]
        return [*outputs, *torch.autograd.grad(outputs, inputs, [dout, dfinal][: len(outputs)])]

    assert_recorded_calls_repeat(run)
