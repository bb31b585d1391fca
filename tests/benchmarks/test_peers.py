import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from benchmarks.cases.cases import Row
from benchmarks.harness import find
from benchmarks.harness.errors import WRONG, errors, reference
from lightning_attention import decay, lightning_attention
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape, measure
from lightning_attention.bench.peers import OURS, PACKED_ATTENTION, Peer, ours
from tests.benchmarks.stand_ins import CULA
from tests.kernels.triton.support.interpreter import interpreted

SHAPE = Shape(2, 33, 3, 16)
SHAPES = {"linghe": Shape(2, 64, 3, 128)}  # of those that do not have every shape


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
    assert list(found) == ["cula", "engines", "fla", "lightning_attn", "linghe", "sdpa", "seg_la", "vllm", "vllm_layer"]
    assert all(isinstance(p, Peer) for group in found.values() for p in group)


@pytest.mark.parametrize("name", ["fla", "lightning_attn", "linghe", "cula"])
def test_the_peers_signatures_give_the_same_function(name, cpu, monkeypatch):
    """The packages need a GPU; stand-ins with their documented signatures show that the arguments mean the same."""

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, cu_seqlens=None):
        assert g is None
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        return lightning_attention(q, k, v, g_gamma, scale=scale, cu_seqlens=cu_seqlens).output, None

    def lightning_attn_func(q, k, v, s):
        assert s.shape == (3, 1, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lightning_attention(q, k, v, -s.flatten()).output.transpose(1, 2)

    def triton_lightning_attention_forward(q, k, v, decay_scales, hpc=False, hp=False, softmax_scale=None):
        assert not hpc
        assert not hp
        return lightning_attention(q, k, v, -decay_scales, scale=softmax_scale, output_final_state=True)

    def triton_lightning_attention_backward(
        output_grad, q, k, v, decay_scales, softmax_scale=None, hpc=False, hp=False
    ):
        assert not hpc
        assert not hp
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = lightning_attention(*leaves, -decay_scales, scale=softmax_scale).output
        return torch.autograd.grad(out, leaves, output_grad)

    _module(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    _module(monkeypatch, "lightning_attn.ops", lightning_attn_func=lightning_attn_func)
    _module(monkeypatch, "linghe.attn.la", triton_lightning_attention_forward=triton_lightning_attention_forward,
            triton_lightning_attention_backward=triton_lightning_attention_backward)  # fmt: skip
    _module(monkeypatch, "cula.lightning", **CULA)
    (peer,) = find.peers()[name]
    problem = Problem(SHAPES.get(name, SHAPE), torch.float32, cpu)
    found = errors(problem, peer, reference(problem))
    assert list(found) == (["output", "dq", "dk", "dv"] if peer.backward else ["output"])
    assert max(found.values()) < 1e-5
    q, k, v, _ = problem.inputs(peer, grad=False)
    torch.testing.assert_close(peer.attention()(q, k, v, None), peer.attention()(q, k, v, torch.zeros(3)))
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


@pytest.mark.parametrize(("name", "module"), [("linghe", "linghe.attn.la"), ("cula", "cula.lightning")])
def test_a_missing_checkout_is_named_with_how_to_get_it(name, module, problem, monkeypatch):
    (peer,) = find.peers()[name]
    with monkeypatch.context() as nothing:
        nothing.setitem(sys.modules, module.partition(".")[0], None)
        error = measure([peer], problem, FORWARD, seconds=0.01)[name]["error"]
    assert error.startswith(f"ModuleNotFoundError: {module} is not there; put a checkout of github.com/")
    assert error.endswith("on PYTHONPATH")


def test_what_a_checkout_needs_is_named(tmp_path, problem, monkeypatch):
    (tmp_path / "cula").mkdir()
    (tmp_path / "cula" / "__init__.py").write_text("import cutlass.cute\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cula", raising=False)
    monkeypatch.setitem(sys.modules, "cutlass", None)
    error = measure(list(find.peers()["cula"]), problem, FORWARD, seconds=0.01)["cula"]["error"]
    assert error == "ModuleNotFoundError: cula needs cutlass.cute, which is not installed (docs/benchmarks.md)"


def test_a_peer_without_a_backward_pass_is_left_out_of_it(problem, monkeypatch):
    _module(monkeypatch, "cula.lightning", **CULA)
    found = measure([*find.peers()["cula"], ours()], problem, BOTH, seconds=0.01)
    assert list(found) == ["cula", OURS]
    assert found["cula"] == {"skipped": "it has no backward pass"}
    assert found[OURS]["ms"] > 0


@pytest.mark.parametrize("shape", [(1, 64, 2, 64), (1, 33, 2, 128)])
def test_linghe_is_not_given_what_its_kernels_do_not_look_at(shape, cpu, monkeypatch):
    _module(monkeypatch, "linghe.attn.la")
    found = measure(list(find.peers()["linghe"]), Problem(Shape(*shape), torch.float32, cpu), FORWARD, seconds=0.01)
    assert found["linghe"] == {"error": "ValueError: linghe wants D = E, a multiple of 128, and T of 32"}


def _linghes(log_decay: str) -> dict[str, float]:
    """Errors of its own kernels against float64."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    decays = {"ALiBi": decay.alibi, "none": lambda _: None}[log_decay]
    problem = Problem(SHAPES["linghe"], torch.float32, torch.device("cpu"), log_decay=decays)
    (peer,) = find.peers()["linghe"]
    return errors(problem, peer, reference(problem))


@interpreted
def test_linghes_own_kernels(interpreter):
    """Right without decays. With them its gradients of q and k are not those of its output, as docs/benchmarks.md says.

    Where this fails because they are right, the page has to be changed.
    """
    if find_spec("linghe") is None:
        pytest.skip("linghe is not installed")
    assert max(interpreter.call(_linghes, "none").values()) < 1e-5
    found = interpreter.call(_linghes, "ALiBi")
    assert max(found["output"], found["dv"]) < 1e-5
    assert min(found["dq"], found["dk"]) > WRONG
