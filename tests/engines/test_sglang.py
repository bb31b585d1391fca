"""``seg_la_fwd`` against float64, and, where SGLang's own file is installed, beside it."""

import sys
from collections.abc import Iterator
from dataclasses import make_dataclass
from types import ModuleType

import pytest
import torch

from lightning_attention.integrations import sglang as ours
from tests.engines.sglang_calls import CALLS, MORE, Meta, absent, check, make, on, prepared, run
from tests.kernels.triton.support.interpreter import Interpreter, interpreted

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

#: Padding and pools of other layouts, of every kind of call.
PADDED = (
    "prefill with padding", "trees with padding", "tracked with padding", "any negative slot",
    "decode of a layer's pool", "prefill of a transposed pool", "drafts of a layer's pool",
)  # fmt: skip
TOLERANCE = {FP32: 4e-6, FP16: 2e-3, BF16: 1e-2}


@pytest.mark.parametrize("state_dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("name", [*CALLS, *MORE])
def test_against_float64(name: str, state_dtype: torch.dtype):
    call = make(**(CALLS | MORE)[name], state_dtype=state_dtype)
    check(call, run(call), TOLERANCE[FP32], {FP32: 4e-6, FP16: 6e-4, BF16: 5e-3}[state_dtype])


@interpreted
@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("name", ["ragged", "decode with padding", "tracked", "drafts with padding", "trees", *PADDED])
def test_the_kernels_against_float64(interpreter: Interpreter, name: str, dtype: torch.dtype):
    call = make(**(CALLS | MORE)[name], dtype=dtype)
    check(call, interpreter.call(run, call, True, True), TOLERANCE[dtype], 2e-3 if dtype == FP16 else 4e-6)


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_sglangs_own_agrees(interpreter: Interpreter, name: str):
    """Its function in Triton's interpreter passes the same check, a little looser: it divides by decays."""
    absent()
    call = make(**CALLS[name])
    check(call, interpreter.call(run, call, False), 1e-4, 1e-4, own=False)


@pytest.mark.parametrize("name", [*CALLS, *MORE])
def test_nothing_is_read_on_the_host(name: str):
    """Tensors without memory have nothing that could be read."""
    call = make(**(CALLS | MORE)[name])
    made, _, _ = prepared(on("meta", call), own=True)
    out = made()
    assert (out.device.type, out.shape, out.dtype) == ("meta", call.v.shape, call.v.dtype)


def test_other_layers_states_stay():
    call = make(**MORE["prefill of a layer's pool"])
    made, pool, _ = prepared(call, own=True)
    made()
    others = pool._base[:, ::2]
    assert torch.equal(others, call.pool[:, None].expand_as(others))


def test_the_check_notices():
    call = make(**CALLS["tracked"])
    for wrong in ({"scale": None}, {"slots": [0, 3, 6, 1]}, {"track": [(63, 4), (64, 5), (0, 2), (5, -1)]}):
        with pytest.raises(AssertionError):
            check(make(**CALLS["tracked"] | wrong), run(call), 1e-4, 1e-4)


class Stub(ModuleType):
    """A module of SGLang's that has its function and its meta object."""


def _seg_la_fwd(
    q, k, v, s, decay_scales, meta, caches=None, cache_indices=None, track_lens=None, track_state_indices=None,
    softmax_scale=None,
):  # fmt: skip
    raise AssertionError("SGLang's own was called")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """SGLang's module, and a backend that imported the function from it."""
    for name in ("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.attention"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.kernels.ops.attention.linear", ModuleType("linear"))
    module, backend = Stub(ours._MODULE), Stub("sglang.srt.lightning_backend")
    module.SegLaMeta, module.seg_la_fwd = Meta, _seg_la_fwd
    backend.seg_la_fwd = _seg_la_fwd
    monkeypatch.setitem(sys.modules, ours._MODULE, module)
    monkeypatch.setitem(sys.modules, "sglang.srt.lightning_backend", backend)
    yield module
    ours.remove_lightning_attention()


def test_it_takes_the_place_of_the_engines_own_and_gives_it_back(engine: ModuleType):
    backend = sys.modules["sglang.srt.lightning_backend"]
    ours.apply_lightning_attention()
    ours.apply_lightning_attention()
    assert engine.seg_la_fwd is backend.seg_la_fwd is ours.seg_la_fwd
    late = sys.modules["sglang.srt.later"] = Stub("sglang.srt.later")
    late.seg_la_fwd = engine.seg_la_fwd  # as ``from … import seg_la_fwd`` would
    try:
        ours.remove_lightning_attention()
        assert engine.seg_la_fwd is backend.seg_la_fwd is late.seg_la_fwd is _seg_la_fwd
        ours.remove_lightning_attention()
        assert engine.seg_la_fwd is _seg_la_fwd
    finally:
        del sys.modules["sglang.srt.later"]


def test_what_is_not_known_is_refused(engine: ModuleType):
    engine.seg_la_fwd = lambda q, k, v, s, decay_scales, meta: None
    with pytest.raises(ValueError, match=r"seg_la.seg_la_fwd takes \(q, k, v, s, decay_scales, meta\); what is known"):
        ours.apply_lightning_attention()
    del engine.seg_la_fwd
    with pytest.raises(ValueError, match=r"seg_la has no seg_la_fwd; this version of the engine is not known"):
        ours.apply_lightning_attention()
    engine.seg_la_fwd = _seg_la_fwd
    engine.SegLaMeta = make_dataclass("SegLaMeta", ["batch_size", "window"])
    with pytest.raises(ValueError, match="SegLaMeta has the fields batch_size, window; what is known has batch_size,"):
        ours.apply_lightning_attention()
    assert engine.seg_la_fwd is _seg_la_fwd


def test_what_was_replaced_since_is_not_put_back(engine: ModuleType):
    ours.apply_lightning_attention()
    engine.seg_la_fwd = another = lambda: None
    with pytest.raises(ValueError, match="seg_la_fwd has been replaced since; put that back first"):
        ours.remove_lightning_attention()
    assert engine.seg_la_fwd is another
    engine.seg_la_fwd = ours.seg_la_fwd


def test_the_installed_one_is_known():
    absent()
    from benchmarks.peers._sglang import sglang

    module = sglang("seg_la.py")
    found = tuple(module.SegLaMeta.__dataclass_fields__)
    assert found == ours._META
    from lightning_attention.integrations.engines import _parameters

    assert _parameters(module.seg_la_fwd) == [
        (name, kind, default) for name, kind, default in _parameters(ours.seg_la_fwd)
    ]


def test_slopes_are_negated_once():
    slopes = torch.rand(3, 1, 1)
    first = ours.log_decay_of(slopes)
    assert first is ours.log_decay_of(slopes)
    assert torch.equal(first, -slopes.flatten())
    assert ours.log_decay_of(slopes.clone()) is not first


def test_caches_of_other_strides_are_refused():
    call = make([2, 2], drafts=True)
    caches = torch.zeros(4, 3, *call.pool.shape[1:])[:, :2]
    meta = Meta(2, None, torch.tensor([0, 2, 4]), torch.tensor([3, 0]), torch.tensor([2, 2]), torch.ones(2))
    inputs = call.q, call.k, call.v, call.pool, call.slopes, meta, caches
    with pytest.raises(ValueError, match="the first must be 2 times the second"):
        ours.seg_la_fwd(*inputs, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="caches came without cache_indices"):
        ours.seg_la_fwd(*inputs)
