"""Flash-linear-attention's functions on a GPU, with the whole grid of its tests: against float64, and against fla."""

from typing import Any

import pytest
import torch

from tests.dropins.fla_calls import (
    MODULES,
    PACKED,
    absent,
    check,
    errors,
    first_original,
    in_float64,
    make,
    moved,
    of_the_grid,
    run_ours,
)
from tests.kernels.triton.support.device import DEVICE, needs_gpu

pytestmark = needs_gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}
FLAS = 1e-2  # its own tests allow 5e-3 from another of its functions

of_every_size = pytest.mark.parametrize(("name", "B", "T", "H", "K", "ratio", "scale", "normalizer"), of_the_grid())


@of_every_size
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_against_float64(
    name: str, B: int, T: int, H: int, K: int, ratio: int, scale: Any, normalizer: Any, dtype: torch.dtype
):
    call = moved(make(name, B, T, H, K, ratio, scale, normalizer, dtype=dtype), DEVICE)
    check(run_ours(call), in_float64(call), TOLERANCE[dtype])


@of_every_size
def test_flas_own_agrees(name: str, B: int, T: int, H: int, K: int, ratio: int, scale: Any, normalizer: Any):
    absent()
    call = moved(make(name, B, T, H, K, ratio, scale, normalizer, dtype=FP16), DEVICE)
    its = first_original(call)
    wrong = errors(its, in_float64(call), FLAS)
    if wrong:
        pytest.xfail(f"fla's own is wrong here, against float64: {wrong}")
    check(its, run_ours(call), FLAS)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed(name: str, dtype: torch.dtype):
    for H, K, ratio, cuts in PACKED:
        call = moved(make(name, H=H, K=K, ratio=ratio, cu_seqlens=cuts, dtype=dtype), DEVICE)
        check(run_ours(call), in_float64(call), TOLERANCE[dtype])
