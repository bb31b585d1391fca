import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lightning_attention import decay, lightning_attention
from lightning_attention.bench.op import FORWARD, Problem, Shape, measure
from lightning_attention.bench.peers import OURS, ours, peers

SHAPE = Shape(2, 33, 3, 16)


@pytest.fixture
def problem(cpu) -> Problem:
    return Problem(SHAPE, torch.float32, cpu)


def _module(monkeypatch, name: str, **members: object) -> None:
    """Put a module, and the packages above it, where import finds them."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_ours_computes_the_operation(problem):
    q, k, v, _ = problem.tensors
    wanted = lightning_attention(q, k, v, decay.alibi(3)).output
    assert torch.equal(problem.call(ours(), FORWARD)(), wanted)
    assert ours().name == OURS
    assert ours("reference").name == f"{OURS}:reference"


def test_sdpa_is_causal_softmax_attention_in_its_own_layout(problem, cpu):
    (sdpa,) = peers(["sdpa"], cpu)
    q, k, v, _ = (x.transpose(1, 2) for x in problem.tensors)
    torch.testing.assert_close(problem.call(sdpa, FORWARD)(), scaled_dot_product_attention(q, k, v, is_causal=True))
    assert sdpa.softmax
    assert sdpa.version().split("+")[0] == torch.__version__.split("+")[0]  # PyPI leaves out what it was built for


def test_on_a_gpu_sdpa_stands_for_each_fast_backend():
    assert [p.name for p in peers(["sdpa"], torch.device("cuda"))] == ["sdpa_cudnn", "sdpa_flash"]


def test_an_sdpa_backend_is_the_one_that_runs(problem):
    """PyTorch has its flash backend on a CPU too, and refuses cuDNN there: the choice is not silently another's."""
    cudnn, flash = peers(["sdpa"], torch.device("cuda"))
    q, k, v, _ = (x.transpose(1, 2) for x in problem.tensors)
    torch.testing.assert_close(problem.call(flash, FORWARD)(), scaled_dot_product_attention(q, k, v, is_causal=True))
    with pytest.raises(RuntimeError, match="kernel"):
        problem.call(cudnn, FORWARD)()


@pytest.mark.parametrize("name", ["fla", "lightning_attn"])
def test_the_peers_signatures_give_the_same_function(name, problem, cpu, monkeypatch):
    """Both packages need a GPU; stand-ins with their documented signatures show that the arguments mean the same."""

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
        assert g is None
        return lightning_attention(q, k, v, g_gamma, scale=scale).output, None

    def lightning_attn_func(q, k, v, s):
        assert s.shape == (3, 1, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lightning_attention(q, k, v, -s.flatten()).output.transpose(1, 2)

    _module(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    _module(monkeypatch, "lightning_attn.ops", lightning_attn_func=lightning_attn_func)
    (peer,) = peers([name], cpu)
    errors = problem.errors(peer, problem.reference())
    assert max(errors.values()) < 1e-5


def test_a_missing_peer_is_reported_and_the_others_are_measured(problem, cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    found = measure([ours(), *peers(["fla", "sdpa"], cpu)], problem, FORWARD, seconds=0.01)
    assert list(found) == [OURS, "fla", "sdpa"]
    assert found["fla"]["error"].startswith("ModuleNotFoundError")
    assert found[OURS]["ms"] > 0
    assert found["sdpa"]["ms"] > 0


def test_an_unknown_peer_is_an_error(cpu):
    with pytest.raises(ValueError, match="peers has 'flash'; it must be among 'fla', 'lightning_attn', 'sdpa'"):
        peers(["flash"], cpu)
