"""``seg_la_fwd`` on a GPU, against float64: ours, and SGLang's own where it is installed."""

import pytest
import torch

from tests.engines.sglang_calls import CALLS, MORE, absent, check, make, on, prepared, run
from tests.kernels.triton.support.device import DEVICE, needs_gpu, no_waiting

# That mode calls itself a prototype.
pytestmark = [*needs_gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = [(BF16, FP32), (BF16, BF16), (FP16, FP16), (FP32, FP32)]
OF_STATES = {FP32: 0.0, FP16: 2e-3, BF16: 6e-3}


@pytest.mark.parametrize("name", [*CALLS, *MORE])
@pytest.mark.parametrize(("dtype", "state_dtype"), TYPES)
def test_against_float64(name: str, dtype: torch.dtype, state_dtype: torch.dtype):
    call = make(**(CALLS | MORE)[name], dtype=dtype, state_dtype=state_dtype)
    tolerance = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}[dtype]
    check(call, run(on(DEVICE, call)), tolerance, max(tolerance, OF_STATES[state_dtype]))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("dtype", "state_dtype"), TYPES)
def test_sglangs_own_agrees(name: str, dtype: torch.dtype, state_dtype: torch.dtype):
    """It adds partial outputs in 16 bits, and multiplies float32 in TF32: SGLang's own tests allow 3e-2."""
    absent()
    call = make(**CALLS[name], dtype=dtype, state_dtype=state_dtype)
    check(call, run(on(DEVICE, call), own=False), 3e-2, 3e-2, own=False)


@pytest.mark.parametrize("name", [*CALLS, *MORE])
def test_captured_without_waiting_for_the_device(name: str):
    call = make(**(CALLS | MORE)[name], dtype=BF16)
    run(on(DEVICE, call))  # compiled, and the slopes negated
    made, pool, caches = prepared(on(DEVICE, call), own=True)
    graph = torch.cuda.CUDAGraph()
    with no_waiting(), torch.cuda.graph(graph):
        out = made()
    pool.copy_(call.pool)
    graph.replay()
    check(call, (out, pool, caches), 1e-2, 1e-2)


@pytest.mark.parametrize("name", ["decode with padding", "ragged", "tracked", "drafts with padding", "trees"])
def test_captured_on_padding_for_whoever_comes(name: str):
    """As an engine captures a step: requests get their rows, and tokens their requests, when the graph is there."""
    call = make(**(CALLS | MORE)[name], dtype=BF16)
    made, pool, caches = prepared(on(DEVICE, call), own=True)
    meta = made.args[-1]
    slots, bounds = meta.s_offsets.clone(), meta.q_offsets.clone()
    meta.s_offsets.fill_(-1)
    if name in ("ragged", "tracked"):
        meta.q_offsets[1:-1] = torch.arange(1, len(slots), device=DEVICE)  # another packing of as many tokens
    before = pool.clone()
    made()
    graph = torch.cuda.CUDAGraph()
    with no_waiting(), torch.cuda.graph(graph):
        out = made()
    graph.replay()
    assert torch.equal(pool, before)
    assert not out.any()
    meta.s_offsets.copy_(slots)
    meta.q_offsets.copy_(bounds)
    graph.replay()
    check(call, (out, pool, caches), 1e-2, 1e-2)
