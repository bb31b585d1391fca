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
from lightning_attention.kernels.triton import recent as steps
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.offline import CHIPS, Launch, launched_by
from tests.support import relative_error
from tests.support.rings import Walk, by_backend, tensors, walk, whole

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
@pytest.mark.parametrize("options", [{}, SNAPSHOTS], ids=["", "snapshots"])
def test_prefill(interpreter: Interpreter, rings: bool, options: dict[str, Any]):
    def call(backend: str) -> list[Tensor]:
        return interpreter.call(_prefill_with, backend, rings, options)

    got, expected = call("triton"), call("tiled")
    assert torch.equal(got[2], expected[2])
    assert relative_error(got[0], expected[0]) <= 2e-6
    assert relative_error(got[1], expected[1]) <= 2e-5  # sums that differ in their last bit may be rounded apart


def _prefill_with(backend: str, rings: bool, options: dict[str, Any]) -> list[Tensor]:
    return _prefilled(backend, rings, **options)


STEPS = ("decode", "decode", "decode", "verify", "commit", "commit", "fold")


@interpreted
@pytest.mark.parametrize(
    "of",
    [
        Walk(H=3, Hk=1, R=3, state_dtype=INT8, operations=STEPS),
        Walk(H=2, Hk=2, D=16, E=16, R=4, rate="no memory", state_dtype=INT8, operations=STEPS),
        Walk(S=2, H=1, Hk=1, D=20, E=130, R=5, rate="none", state_dtype=INT8, operations=STEPS),
        Walk(H=2, Hk=1, R=1, state_dtype=INT8, operations=STEPS),
    ],
    ids=lambda of: f"{of.rate}-{of.H}-{of.R}-{of.E}",
)
def test_walks(interpreter: Interpreter, of: Walk):
    interpreter.call(walk, of, 16, "triton", "cpu", 1.5e-2, 10, 3e-4)


def _stepped(backend: str) -> list[Tensor]:
    """Outputs, planes and scales after steps of which each folds a head or more."""
    of = Walk(S=4, H=5, D=12, E=20, R=4, state_dtype=INT8)
    torch.manual_seed(0)
    pool, recent, log_decay = of.pool(torch.randn(4, 5, 12, 20)), of.rings(), of.log_decay()
    options, outs = {"slots": torch.tensor([2, -1, 0]), "recent": recent}, []
    for step in range(9):
        q, k, v = torch.randn(6, 1, 12), torch.randn(6, 1, 12), torch.randn(6, 5, 20)
        packed = {"cu_seqlens": torch.tensor([0, 3, 4, 6]), **options}
        with by_backend(backend):
            if step % 3 < 2:
                outs.append(lightning_attention_decode(q[:3], k[:3], v[:3], log_decay, pool, **options))
            else:
                outs.append(lightning_attention_verify(q, k, v, log_decay, pool, **packed))
                accepted = torch.tensor([True, True, False, True, True, step > 4])
                lightning_attention_commit(k, v, log_decay, pool, accepted=accepted, **packed)
    return [*outs, *tensors(pool), recent.count]


@interpreted
def test_steps_leave_what_plain_pytorch_leaves(interpreter: Interpreter):
    """But for numbers that the last bit of a sum rounds the other way."""
    got, expected = (interpreter.call(_stepped, backend) for backend in ("triton", "tiled"))
    assert torch.equal(got[-1], expected[-1])
    for a, b in zip(got[:-1], expected[:-1], strict=True):
        if a.dtype == INT8:
            assert (a != b).float().mean() <= 2e-3
        else:
            assert relative_error(a, b) <= 1e-4


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


def stepped(chip: str, width: int, N: int, dtype: torch.dtype = torch.bfloat16, S: int = 300) -> list[Launch]:
    """Decode, verify as chains and as trees, commit and fold."""
    H, T, R = 64, 4 * N, 16

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = tensor(3, T, H, width)
    high, low = (tensor(S, H, width, width, dtype=INT8) for _ in range(2))
    rate, slots, cuts, parents = tensor(H, dtype=torch.float32), *(tensor(n, dtype=torch.int32) for n in (N, N + 1, T))
    accepted, ring = tensor(T, dtype=torch.bool), tuple(tensor(S, H, R, width) for _ in range(2))
    pool = *ring, tensor(S, dtype=torch.int32), low, tensor(S, H, width, dtype=torch.float32)

    def run() -> None:
        steps.decode(q[:N], k[:N], v[:N], rate, high, slots, 1.0, False, *pool)
        steps.verify(q, k, v, rate, high, cuts, slots, None, 1.0, *pool)
        steps.verify(q, k, v, rate, high, cuts, slots, parents, 1.0, *pool)
        steps.commit(k, v, rate, high, cuts, accepted, slots, *pool)
        steps.fold(high, rate, slots, None, *pool)

    found = launched_by(run, CHIPS[chip])
    for launch in found:
        print(launch)
    return found


PORTABLE = ["verify_recent_kernel", "commit_recent_kernel", "fold_kernel"]


@pytest.mark.parametrize(
    ("chip", "N", "columns"),
    [("sm_80", 3, 32), ("sm_90", 3, 32), ("sm_90", 64, 64), ("sm_100", 64, 64)],
)
def test_steps_on_nvidia_chips(chip: str, N: int, columns: int):
    """Next to nothing spills, with room for 15 programs of decode; copies are of 16 bytes."""
    found = stepped(chip, 128, N)
    decode, verify = found[:2]
    assert [x.name for x in found] == ["decode_ring_kernel", "verify_ring_kernel", *PORTABLE]
    assert decode.constants["TILE"].columns == columns
    assert decode.registers <= 136
    assert decode.stack <= 8
    assert decode.shared <= 9 << 10
    ptx = decode.compiled.asm["ptx"]
    assert ptx.count("cp.async.cg") == 128 * columns // (16 * 32) + 16  # and two parts of 32 columns, to be folded
    assert "cp.async.ca" not in ptx
    assert ptx.count("mma.sync.aligned.m16n8k32") == 128 // 32 * columns // 16
    assert verify.stack <= 64


def test_steps_with_float32_tokens():
    """Where a head folds, products of float32 want more registers."""
    found = stepped("sm_90", 128, 256, torch.float32)
    assert [x.name for x in found] == ["decode_ring_kernel", "verify_recent_kernel", *PORTABLE]
    assert found[0].stack <= 64, found[0]


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_steps_by_the_portable_kernels(chip: str):
    found = stepped(chip, 128 if chip == "gfx942" else 20, 3)
    assert [x.name for x in found] == ["decode_recent_kernel", "verify_recent_kernel", *PORTABLE]


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
    first = [x.compiled for x in stepped("sm_90", 16, 3)]
    assert [x.compiled for x in stepped("sm_90", 16, 31, S=2**20)] == first
