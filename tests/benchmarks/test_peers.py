import sys
from types import ModuleType

import pytest
import torch

from benchmarks.cases.cases import Row
from benchmarks.harness import find
from benchmarks.harness.errors import errors, reference
from lightning_attention import lightning_attention
from lightning_attention.bench.attention import FORWARD, Problem, Shape, measure
from lightning_attention.bench.peers import OURS, PACKED_ATTENTION, Peer, ours

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


def test_a_peer_is_a_file():
    found = find.peers()
    assert list(found) == ["engines", "fla", "lightning_attn", "sdpa", "seg_la", "vllm", "vllm_layer"]
    assert all(isinstance(p, Peer) for group in found.values() for p in group)


@pytest.mark.parametrize("name", ["fla", "lightning_attn"])
def test_the_peers_signatures_give_the_same_function(name, problem, monkeypatch):
    """Both packages need a GPU; stand-ins with their documented signatures show that the arguments mean the same."""

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, cu_seqlens=None):
        assert g is None
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        return lightning_attention(q, k, v, g_gamma, scale=scale, cu_seqlens=cu_seqlens).output, None

    def lightning_attn_func(q, k, v, s):
        assert s.shape == (3, 1, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lightning_attention(q, k, v, -s.flatten()).output.transpose(1, 2)

    _module(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    _module(monkeypatch, "lightning_attn.ops", lightning_attn_func=lightning_attn_func)
    (peer,) = find.peers()[name]
    assert max(errors(problem, peer, reference(problem)).values()) < 1e-5
    if PACKED_ATTENTION in peer.operations:
        row = Row("packed", 1, 12, 3, 16, 8, dtype=torch.float32, lengths=(7, 5))
        packed = row.problem(problem.device)
        (peer,) = row.others([peer], problem.device)
        assert max(errors(packed, peer, reference(packed, row.exact(problem.device))).values()) < 1e-5


def test_a_missing_peer_is_reported_and_the_others_are_measured(problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    peers = find.peers()
    found = measure([ours(), *peers["fla"], peers["sdpa"][0]], problem, FORWARD, seconds=0.01)
    assert list(found) == [OURS, "fla", "sdpa"]
    assert found["fla"]["error"].startswith("ModuleNotFoundError")
    assert found[OURS]["ms"] > 0
    assert found["sdpa"]["ms"] > 0
