"""vLLM's linear attention on a GPU, against float64: ours, and its own where it is installed."""

import pytest
import torch

from tests.engines.vllm_calls import STEPS, absent, check, make, on, prepared, run
from tests.kernels.triton.support.device import DEVICE, needs_gpu, no_waiting

# That mode calls itself a prototype.
pytestmark = [*needs_gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = [(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16)]  # vLLM's layers compute in float32
OF_STATES = {FP32: 0.0, FP16: 2e-3, BF16: 6e-3}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("dtype", "state_dtype"), TYPES)
def test_against_float64(name: str, dtype: torch.dtype, state_dtype: torch.dtype):
    step = make(**STEPS[name], dtype=dtype, state_dtype=state_dtype)
    tolerance = {FP32: 1e-5, BF16: 1e-2}[dtype]
    check(step, run(on(DEVICE, step)), tolerance, max(tolerance, OF_STATES[state_dtype]))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("dtype", "state_dtype"), TYPES[:3])  # its kernels for prompts take nothing but float32
def test_vllms_own_agrees(name: str, dtype: torch.dtype, state_dtype: torch.dtype):
    """It multiplies float32 in TF32, and rounds a 16-bit state after every draft."""
    absent()
    step = make(**STEPS[name], dtype=dtype, state_dtype=state_dtype)
    check(step, run(on(DEVICE, step), own=False), 3e-2, 3e-2, own=False)


@pytest.mark.parametrize("name", STEPS)
def test_captured_without_waiting_for_the_device(name: str):
    step = make(**STEPS[name], state_dtype=BF16)
    run(on(DEVICE, step))  # compiled
    made, cache = prepared(on(DEVICE, step))
    graph = torch.cuda.CUDAGraph()
    with no_waiting(), torch.cuda.graph(graph):
        out = made()
    cache.copy_(step.cache)
    graph.replay()
    check(step, (out, cache), 1e-2, 1e-2)
