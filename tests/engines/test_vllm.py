"""vLLM's linear attention against float64, and, where its own files are installed, beside it."""

import sys
from collections.abc import Iterator
from inspect import signature
from types import FunctionType, ModuleType

import pytest
import torch

from lightning_attention.integrations import vllm as ours
from lightning_attention.integrations.engines import _parameters
from tests.engines.vllm_calls import STEPS, absent, check, make, metadata, on, prepared, run, vllm
from tests.kernels.triton.support.interpreter import Interpreter, interpreted

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
OF_STATES = {FP32: 4e-6, FP16: 6e-4, BF16: 5e-3}
MINIMAX, BAILING = (f"{ours._FOLDER}{name}_linear_attn" for name in ("minimax", "bailing"))


@pytest.mark.parametrize("state_dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("name", STEPS)
def test_against_float64(name: str, state_dtype: torch.dtype):
    step = make(**STEPS[name], state_dtype=state_dtype)
    check(step, run(step), 4e-6, OF_STATES[state_dtype])


@interpreted
@pytest.mark.parametrize(("dtype", "state_dtype"), [(FP32, FP16), (FP16, FP32)])
@pytest.mark.parametrize("name", ["a step of everything", "drafts and prompts", "drafts with padding"])
def test_the_kernels_against_float64(interpreter: Interpreter, name: str, dtype: torch.dtype, state_dtype: torch.dtype):
    step = make(**STEPS[name], dtype=dtype, state_dtype=state_dtype)
    check(step, interpreter.call(run, step, True, True), {FP32: 4e-6, FP16: 2e-3}[dtype], 2e-3)


@interpreted
@pytest.mark.parametrize("name", STEPS)
def test_vllms_own_agrees(interpreter: Interpreter, name: str):
    absent()
    step = make(**STEPS[name])
    check(step, interpreter.call(run, step, False), 1e-5, 1e-5, own=False)


def test_the_check_notices():
    step = make(**STEPS["drafts and prompts"])
    got = run(step)
    check(step, got, 1e-5, 1e-5)
    for wrong in ({"accepted": [2, 2]}, {"prefixes": [0, 0]}, {"prefixes": [4, 4]}):
        with pytest.raises(AssertionError):
            check(make(**STEPS["drafts and prompts"] | wrong), got, 1e-4, 1e-4)


def test_what_a_step_means_is_found_out_once():
    step = make(**STEPS["a step of everything"])
    meta = metadata(step)
    first = ours._prefills(meta, meta.state_indices_tensor)
    assert all(a is b for a, b in zip(first, ours._prefills(meta, meta.state_indices_tensor), strict=True))
    others = meta.state_indices_tensor.flip(0)  # as of another group of layers
    meta.state_indices_tensor_p = others[step.decodes :]
    assert torch.equal(ours._prefills(meta, others)[1], others[step.decodes :])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """vLLM's two modules, of which Bailing's has a function from MiniMax's."""
    parts = ours._FOLDER.rstrip(".").split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    modules = {name: ModuleType(name) for name in (MINIMAX, BAILING)}
    for name, module in modules.items():
        for function, own in ours._OURS[name].items():
            like = FunctionType(own.__code__, {}, function, own.__defaults__)
            setattr(module, function, like)
        monkeypatch.setitem(sys.modules, name, module)
    modules[BAILING].linear_attention_decode = modules[MINIMAX].linear_attention_decode
    yield modules
    ours.remove_lightning_attention()


def test_they_take_the_place_of_the_engines_own_and_give_it_back(engine: dict[str, ModuleType]):
    before = {name: dict(vars(module)) for name, module in engine.items()}
    assert (
        before[MINIMAX]["linear_attention_prefill_and_mix"] is not before[BAILING]["linear_attention_prefill_and_mix"]
    )
    ours.apply_lightning_attention()
    ours.apply_lightning_attention()
    for name, functions in ours._OURS.items():
        assert all(getattr(engine[name], x) is function for x, function in functions.items())
    ours.remove_lightning_attention()
    for name, module in engine.items():
        assert vars(module) == before[name]


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_read_on_the_host(name: str):
    """Tensors without memory have nothing that could be read."""
    step = make(**STEPS[name])
    made, _ = prepared(on("meta", step))
    out = made()
    assert (out.device.type, out.shape) == ("meta", step.v.flatten(1).shape)


def test_what_is_not_known_is_refused_and_nothing_is_changed(engine: dict[str, ModuleType]):
    before = dict(vars(engine[MINIMAX]))
    engine[BAILING].bailing_linear_attention_decode_spec = lambda q, k, v: None
    with pytest.raises(
        ValueError, match=r"bailing_linear_attention_decode_spec takes \(q, k, v\); what is known takes"
    ):
        ours.apply_lightning_attention()
    del engine[BAILING].bailing_linear_attention_decode_spec
    with pytest.raises(ValueError, match="bailing_linear_attn has no bailing_linear_attention_decode_spec"):
        ours.apply_lightning_attention()
    assert vars(engine[MINIMAX]) == before


def test_the_installed_ones_are_known():
    absent()
    theirs = vllm()
    for name, file in ((MINIMAX, theirs.minimax), (BAILING, theirs.bailing)):
        for function, own in ours._OURS[name].items():
            found = getattr(file, function, None) or getattr(theirs.minimax, function)
            assert _parameters(found) == _parameters(own), (function, signature(found))
