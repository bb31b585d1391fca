"""fla's layers with our functions in the place of its own."""

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention.integrations import flash_linear_attention as ours
from lightning_attention.nn import LightningAttention
from tests.dropins.fla_calls import absent, interpreting_fla
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.support import relative_error


def stub(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("fla's own was called")

    return called


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Modules with fla's functions, and one of a layer that imported one."""
    modules = {name: ModuleType(name) for name in ("fla", "fla.ops", *ours._FUNCTIONS, "fla.layers")}
    for name, functions in ours._FUNCTIONS.items():
        vars(modules[name]).update({n: stub(function) for n, function in functions.items()})
    modules["fla.layers"].chunk_retention = modules["fla.ops.retention"].chunk_retention
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield modules
    ours.remove_lightning_attention()


def test_functions_take_the_place_of_flas_and_give_it_back(fla: dict[str, ModuleType]):
    before = {name: dict(vars(module)) for name, module in fla.items()}
    ours.apply_lightning_attention()
    ours.apply_lightning_attention()
    assert fla["fla.layers"].chunk_retention is ours.chunk_retention
    for name, functions in ours._FUNCTIONS.items():
        assert {n: vars(fla[name])[n] for n in functions} == functions
    ours.remove_lightning_attention()
    assert {name: dict(vars(module)) for name, module in fla.items()} == before


def test_a_version_that_is_not_known_is_refused(fla: dict[str, ModuleType]):
    module = fla["fla.ops.linear_attn"]
    own = fla["fla.ops.retention"].chunk_retention
    module.chunk_linear_attn = lambda q, k, v, window: None
    with pytest.raises(ValueError, match=r"chunk_linear_attn takes \(q, k, v, window\); what is known takes \(q: "):
        ours.apply_lightning_attention()
    assert fla["fla.ops.retention"].chunk_retention is own


LAYERS = {
    "retention": ("multiscale_retention", "MultiScaleRetention", {}),
    "retention, fewer keys": ("multiscale_retention", "MultiScaleRetention", {"num_kv_heads": 1, "fuse_norm": False}),
    "linear": ("linear_attn", "LinearAttention", {"feature_map": "elu"}),
    "linear, normalised": ("linear_attn", "LinearAttention", {"feature_map": "elu", "do_feature_map_norm": True}),
}


def _results(name: str, applied: bool) -> list[Tensor]:
    """A prompt with its gradients, padding, and a prompt and two more tokens with a cache."""
    from importlib import import_module

    place, kind, options = LAYERS[name]
    with interpreting_fla():
        module, cache = import_module(f"fla.layers.{place}"), import_module("fla.models.cache_utils").Cache()
        torch.manual_seed(0)
        layer = getattr(module, kind)(hidden_size=32, num_heads=2, layer_idx=0, **options)
        x, mask = torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.long)
        mask[0, :5] = 0
        chunk = f"chunk_{'retention' if 'retention' in place else 'linear_attn'}"
        own = getattr(module, chunk)
        if applied:
            ours.apply_lightning_attention()
            assert getattr(module, chunk) is getattr(ours, chunk)
        else:  # which is what fla's tests compare it with, and what the interpreter can run
            setattr(module, chunk, getattr(module, f"fused_recurrent_{chunk.removeprefix('chunk_')}"))
        try:
            out, *_ = layer(x)
            grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
            with torch.no_grad():
                padded, *_ = layer(x, attention_mask=mask)
                parts = [layer(part, past_key_values=cache, use_cache=True)[0] for part in x.split([10, 1, 1], 1)]
        finally:
            setattr(module, chunk, own)
            ours.remove_lightning_attention()
        assert getattr(module, chunk) is own
    return [out.detach(), padded, torch.cat(parts, 1), *grads]


@interpreted
@pytest.mark.parametrize("name", LAYERS)
def test_flas_layers_compute_the_same(interpreter: Interpreter, name: str):
    absent()
    own, applied = (interpreter.call(_results, name, which) for which in (False, True))
    for mine, theirs in zip(applied, own, strict=True):
        assert relative_error(mine, theirs) <= 1e-5
    assert relative_error(applied[2], applied[0]) <= 1e-5


def _retention_and_its_weights(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    from importlib import import_module

    with interpreting_fla(), torch.no_grad():
        layer = import_module("fla.layers.multiscale_retention").MultiScaleRetention(hidden_size=32, num_heads=2)
        torch.nn.init.normal_(layer.g_norm_swish_gate.weight)
        return layer(x)[0], layer.state_dict()


@interpreted
@torch.no_grad()
def test_a_layer_of_ours_with_the_weights_of_flas(interpreter: Interpreter):
    """As docs/migrating.md says."""
    absent()
    x = torch.randn(2, 20, 32)
    theirs, w = interpreter.call(_retention_and_its_weights, x)
    layer = LightningAttention.retnet(32, 2, rope_base=10000.0, norm_weight=True)
    layer.norm.eps = 1e-5
    layer.load_state_dict(
        {
            "qkv_proj.weight": torch.cat([w[f"{name}_proj.weight"] for name in "qkv"]),
            "gate_proj.weight": w["g_proj.weight"],
            "out_proj.weight": w["o_proj.weight"],
            "norm.weight": w["g_norm_swish_gate.weight"].repeat(2),
        }
    )
    assert relative_error(layer(x)[0], theirs) <= 1e-5
