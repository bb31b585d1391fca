"""Pools in 8 bits with the kernels: interpreted on the CPU against plain PyTorch, and compiled for other chips."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_fold,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from lightning_attention.kernels.triton import quantized as launches
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.offline import CHIPS, Launch, launched_by
from tests.support import relative_error
from tests.support.rings import Walk, by_backend, tensors, whole

INT8 = torch.int8


def _rows(backend: str, D: int, E: int) -> list[Tensor]:
    """A pool, some rows of which were written, and those and one more read."""
    torch.manual_seed(0)
    states = torch.randn(4, 3, D, E)
    states[0, 0] *= 1e-40
    states[2, 1, 0, 0], states[2, 1, 1, 1] = torch.inf, torch.nan
    states[3, 2] = 0
    slots = torch.tensor([2, -1, 0, 4])
    with by_backend(backend):
        pool = Walk(state_dtype=INT8).pool(torch.randn(5, 3, D, E))
        pool.quantize(states.mT.contiguous().mT, slots)
        return [*tensors(pool), pool.dequantize(torch.tensor([4, 0, -1, 1])), pool.dequantize()]


@interpreted
@pytest.mark.parametrize(("D", "E"), [(8, 5), (20, 130), (16, 16), (200, 40)])
def test_rows(interpreter: Interpreter, D: int, E: int):
    """As plain PyTorch's, but for halves that are rounded the other way, and for scales that are not finite."""
    got, expected = interpreter.call(_rows, "triton", D, E), _rows("tiled", D, E)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        if a.dtype == INT8:
            assert (a != b).float().mean() <= 1e-3
        else:
            assert relative_error(torch.where(a.isfinite(), a, 0), torch.where(b.isfinite(), b, 0)) <= 1e-5
    assert (~got[-1].isfinite()).sum() == 2 * D
    assert not got[-2][2].any()
    assert not got[-1][2, 0].any()


def _prefilled(backend: str, rings: bool, **options: Any) -> list[Tensor]:
    """Outputs, states and counts after a prompt, a fresh one, padding, and a sequence without tokens."""
    of = Walk(S=6, H=2, R=4, state_dtype=INT8)
    torch.manual_seed(0)
    pool, recent, log_decay = of.pool(torch.randn(6, 2, 8, 5)), of.rings(), of.log_decay()
    for _ in range(6):
        q, k, v = torch.randn(6, 2, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 5)
        with by_backend("tiled"):
            lightning_attention_decode(q, k, v, log_decay, pool, recent=recent)
    if not rings:
        with by_backend("tiled"):
            lightning_attention_fold(pool, recent, log_decay)
    q, k, v = torch.randn(75, 2, 8), torch.randn(75, 2, 8), torch.randn(75, 2, 5)
    with by_backend(backend):
        out = lightning_attention_prefill(
            q, k, v, log_decay, pool, cu_seqlens=torch.tensor([0, 3, 73, 74, 74]), slots=torch.tensor([0, 3, -1, 1]),
            fresh=torch.tensor([False, True, False, False]), recent=recent if rings else None, **options,
        )  # fmt: skip
    with by_backend("tiled"):
        return [out, whole(pool, recent, log_decay), recent.count]


SNAPSHOTS = {
    "snapshot_at": torch.tensor([[2, 3], [64, 71], [1, 1], [0, -1]]),
    "snapshot_slots": torch.tensor([[4, -1], [5, 2], [-1, -1], [-1, -1]]),
}


@interpreted
@pytest.mark.parametrize("rings", [False, True])
@pytest.mark.parametrize("options", [{}, SNAPSHOTS, {"batch_invariant": True}], ids=["", "snapshots", "invariant"])
def test_prefill(interpreter: Interpreter, rings: bool, options: dict[str, Any]):
    def call(backend: str) -> list[Tensor]:
        return interpreter.call(_prefill_with, backend, rings, options)

    got, expected = call("triton"), call("tiled")
    assert torch.equal(got[2], expected[2])
    assert relative_error(got[0], expected[0]) <= 2e-6
    assert relative_error(got[1], expected[1]) <= 2e-5  # sums that differ in their last bit may be rounded apart


def _prefill_with(backend: str, rings: bool, options: dict[str, Any]) -> list[Tensor]:
    return _prefilled(backend, rings, **options)


@pytest.mark.parametrize("operation", ["decode", "verify", "commit", "fold"])
def test_steps_are_refused(operation: str):
    of = Walk(S=3, H=2, D=16, E=16, state_dtype=INT8)
    pool, recent = of.pool(torch.zeros(3, 2, 16, 16)), of.rings()
    q, v, accepted = torch.zeros(3, 2, 16), torch.zeros(3, 2, 16), torch.ones(3, dtype=torch.bool)
    packed = {"cu_seqlens": torch.arange(4), "recent": recent}
    calls = {
        "decode": lambda: lightning_attention_decode(q, q, v, None, pool, recent=recent),
        "verify": lambda: lightning_attention_verify(q, q, v, None, pool, **packed),
        "commit": lambda: lightning_attention_commit(q, v, None, pool, accepted=accepted, **packed),
        "fold": lambda: lightning_attention_fold(pool, recent, None),
    }
    with (
        by_backend("triton"),
        pytest.raises(TypeError, match=f"state is QuantizedStates; backend 'triton' takes a tensor to {operation}"),
    ):
        calls[operation]()


def launched(chip: str, width: int, *, N: int = 3, S: int = 9) -> list[Launch]:
    """Rows read and written, and what a prefill does beside its sweep: with rings, and their counts cleared."""
    H, R = 4, 16

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    planes = (tensor(S, H, width, width, dtype=INT8), tensor(S, H, width, width, dtype=INT8), tensor(S, H, width))
    slots, fresh, count = tensor(N, dtype=torch.int32), tensor(N, dtype=torch.bool), tensor(S, dtype=torch.int32)
    k, v = (tensor(S, H, R, width, dtype=torch.bfloat16) for _ in range(2))

    def run() -> None:
        states = launches.dequantize(*planes, slots)
        launches.quantize(states, *planes, slots)
        launches._dequantize(*planes, slots, fresh, tensor(H), k, v, count, states)
        launches._quantize(states, *planes, slots, count)

    found = launched_by(run, CHIPS[chip])
    for launch in found:
        print(launch)
    return found


@pytest.mark.parametrize(("chip", "width"), [("sm_80", 64), ("sm_90", 128), ("sm_90", 256), ("gfx942", 128)])
def test_compiles_and_fits(chip: str, width: int):
    """Nothing spills, and planes are read and written 16 bytes at a time."""
    found = launched(chip, width)
    assert [x.name for x in found] == ["dequantize_kernel", "quantize_kernel"] * 2
    for launch in found:
        assert launch.shared <= 16384
        assert launch.stack <= 16, launch
        if "ptx" in launch.compiled.asm:
            assert ("ld" if launch.name == "dequantize_kernel" else "st") + ".global.v" in launch.compiled.asm["ptx"]


def test_another_batch_or_pool_compiles_nothing():
    first = [x.compiled for x in launched("sm_90", 16)]
    for N, S in ((1, 1), (16, 17), (31, 2**20)):
        assert [x.compiled for x in launched("sm_90", 16, N=N, S=S)] == first, (N, S)
