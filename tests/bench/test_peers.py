import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lightning_attention import decay, lightning_attention
from lightning_attention.bench.attention import FORWARD, Problem, Shape
from lightning_attention.bench.peers import OURS, SDPA, is_ours, ours

SHAPE = Shape(2, 33, 3, 16)


@pytest.fixture
def problem(cpu) -> Problem:
    return Problem(SHAPE, torch.float32, cpu)


def test_ours_computes_the_operation(problem):
    q, k, v, _ = problem.tensors
    wanted = lightning_attention(q, k, v, decay.alibi(3)).output
    assert torch.equal(problem.call(ours(), FORWARD)(), wanted)
    assert ours().name == OURS
    assert ours("reference").name == f"{OURS}:reference"
    assert is_ours(OURS)
    assert is_ours(f"{OURS}:reference")
    assert not is_ours(f"{OURS}s")


def test_sdpa_is_causal_softmax_attention_in_its_own_layout(problem):
    (sdpa,) = (p for p in SDPA if "cpu" in p.devices)
    q, k, v, _ = (x.transpose(1, 2) for x in problem.tensors)
    torch.testing.assert_close(problem.call(sdpa, FORWARD)(), scaled_dot_product_attention(q, k, v, is_causal=True))
    assert sdpa.softmax


def test_on_a_gpu_sdpa_stands_for_each_fast_backend():
    assert [p.name for p in SDPA if "cuda" in p.devices] == ["sdpa_cudnn", "sdpa_flash"]


def test_an_sdpa_backend_is_the_one_that_runs(problem):
    """PyTorch has its flash backend on a CPU too, and refuses cuDNN there: the choice is not silently another's."""
    cudnn, flash = (p for p in SDPA if "cuda" in p.devices)
    q, k, v, _ = (x.transpose(1, 2) for x in problem.tensors)
    torch.testing.assert_close(problem.call(flash, FORWARD)(), scaled_dot_product_attention(q, k, v, is_causal=True))
    with pytest.raises(RuntimeError, match="kernel"):
        problem.call(cudnn, FORWARD)()
