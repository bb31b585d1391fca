"""Rings of recent tokens with the kernels: interpreted on the CPU against float64, and compiled for other chips."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    RecentTokens,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_fold,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from lightning_attention.kernels.triton import recent as launches
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.offline import CHIPS, Launch, launched_by
from tests.support.rings import Walk, by_backend, walk

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NO_PREFILL = ("decode", "decode", "decode", "verify", "commit", "commit", "fold")


@interpreted
@pytest.mark.parametrize(
    "of",
    [
        Walk(H=3, Hk=1, R=3, operations=NO_PREFILL),
        Walk(H=2, Hk=2, D=16, E=16, R=4, rate="no memory", operations=NO_PREFILL),
        Walk(H=4, Hk=4, D=5, E=36, R=2, rate="slow", operations=NO_PREFILL),
        Walk(S=2, H=1, Hk=1, D=20, E=130, R=5, rate="none", operations=NO_PREFILL),
        Walk(H=2, Hk=1, R=1, operations=NO_PREFILL),
        Walk(S=2, H=5, Hk=5, D=2, E=3, R=8, operations=("decode",)),
        Walk(H=2, R=20, operations=("decode", "commit", "commit")),
    ],
    ids=lambda of: f"{of.rate}-{of.H}-{of.R}-{of.E}",
)
def test_walks(interpreter: Interpreter, of: Walk):
    interpreter.call(walk, of, 16, "triton", "cpu", 5e-6, 8)


@interpreted
def test_a_walk_with_prompts(interpreter: Interpreter):
    operations = ("decode", "decode", "prefill", "commit")
    of = Walk(H=2, R=3, operations=operations, lengths=(0, 1, 1, 1, 3, 20))
    interpreter.call(walk, of, 16, "triton", "cpu", 5e-6, 4)


@interpreted
def test_float16(interpreter: Interpreter):
    of = Walk(H=2, R=3, dtype=FP16, ring_dtype=FP16, operations=NO_PREFILL)
    interpreter.call(walk, of, 16, "triton", "cpu", 1e-3, 8)


def _both_ways(spoilt: bool) -> dict[str, list[Tensor]]:
    """Tokens of three rows, decoded and committed with rings and without: outputs, and the states."""
    of = Walk(S=3, H=3, Hk=1, D=10, E=20, R=4)
    results: dict[str, list[Tensor]] = {}
    for name in ("rings", "none"):
        torch.manual_seed(0)
        pool, log_decay, recent, outs = torch.randn(3, 3, 10, 20), of.log_decay(), of.rings(), []
        options = {"recent": recent} if name == "rings" else {}
        for step in range(9):
            q, k, v = torch.randn(6, 1, 10), torch.randn(6, 1, 10), torch.randn(6, 3, 20)
            if spoilt and step > 1:
                for x in (q, k, v):
                    x[slice(2, 4) if step % 3 == 2 else 1] = torch.nan  # the second row's two drafts, or its token
            if step % 3 == 2:
                packed = {"cu_seqlens": torch.tensor([0, 2, 4, 6]), **options}
                outs.append(lightning_attention_verify(q, k, v, log_decay, pool, **packed))
                accepted = torch.tensor([True, True, True, False, True, step > 2])
                lightning_attention_commit(k, v, log_decay, pool, accepted=accepted, **packed)
                outs[-1][2:4] = 0
            else:
                outs.append(lightning_attention_decode(q[:3], k[:3], v[:3], log_decay, pool, **options))
                outs[-1][1] = 0
        if name == "rings":
            lightning_attention_fold(pool, recent, log_decay)
        results[name] = [*outs, pool]
    return results


def _both_ways_with_kernels(spoilt: bool) -> dict[str, list[Tensor]]:
    with by_backend("triton"):
        return _both_ways(spoilt)


@interpreted
def test_a_float32_state_is_that_of_no_ring(interpreter: Interpreter):
    """And a sequence of NaN leaves the others the bits that they have without it."""
    clean, spoilt = (interpreter.call(_both_ways_with_kernels, bad) for bad in (False, True))
    for out, expected in zip(clean["rings"], clean["none"], strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for out, expected in zip(spoilt["rings"][:-1], clean["rings"][:-1], strict=True):
        assert torch.equal(out, expected)
    assert torch.equal(spoilt["rings"][-1][[0, 2]], clean["rings"][-1][[0, 2]])
    assert not spoilt["rings"][-1][1].isfinite().any()


def _prefilled(**options: Any) -> Tensor:
    """The counts, 3 before, after a prefill: of a token, a fresh sequence's token, padding, and two tokens."""
    of = Walk(S=4, H=1, Hk=1, D=4, E=4, R=4)
    pool, recent = torch.randn(4, 1, 4, 4), of.rings()
    recent.k.zero_()
    recent.v.zero_()
    recent.count.fill_(3)
    q, k, v = torch.randn(3, 5, 1, 4)
    with by_backend("triton"):
        lightning_attention_prefill(
            q, k, v, None, pool, cu_seqlens=torch.tensor([0, 1, 2, 3, 5]), slots=torch.tensor([2, 0, -1, 3]),
            fresh=torch.tensor([False, True, True, False]), recent=recent, **options,
        )  # fmt: skip
    return recent.count


@interpreted
def test_a_single_token_of_a_prefill_is_appended(interpreter: Interpreter):
    """Not where the state after it may be wanted."""
    assert interpreter.call(_prefilled).tolist() == [0, 3, 4, 0]
    at = {"snapshot_at": torch.zeros(4, 1, dtype=torch.int64), "snapshot_slots": torch.full((4, 1), -1)}
    assert interpreter.call(partial(_prefilled, **at)).tolist() == [0, 3, 0, 0]
    assert interpreter.call(partial(_prefilled, batch_invariant=True)).tolist() == [0, 3, 0, 0]


def _into(into: bool) -> list[Tensor]:
    """A token and drafts of three rows, the second one padding: outputs, in ``out`` where it is given, and states."""
    of, slots = Walk(S=3, H=3, Hk=1, D=10, E=20, R=4), torch.tensor([2, -1, 0])
    torch.manual_seed(0)
    pool, log_decay, recent, results = torch.randn(3, 3, 10, 20), of.log_decay(), of.rings(), []
    q, k, v = torch.randn(7, 1, 10), torch.randn(7, 1, 10), torch.randn(7, 3, 20)
    with by_backend("triton"):
        for T, run, more in (
            (3, lightning_attention_decode, {}),
            (7, lightning_attention_verify, {"cu_seqlens": torch.tensor([0, 2, 4, 6])}),
            (7, lightning_attention_verify,
             {"cu_seqlens": torch.tensor([0, 2, 4, 6]), "parents": torch.tensor([-1, 0, -1, -1, -1, -1, 0])}),
        ):  # fmt: skip
            out = torch.full((T, 3, 20), torch.nan) if into else None
            options = {"slots": slots, "recent": recent, "out": out, **more}
            results.append(run(q[:T], k[:T], v[:T], log_decay, pool, **options))
            assert out is None or results[-1] is out
    return [*results, pool]


@interpreted
def test_into_out_without_padding(interpreter: Interpreter):
    expected, got = (interpreter.call(_into, into) for into in (False, True))
    for a, b, padding in zip(got[:3], expected[:3], ([1], [2, 3, 6], [2, 3, 6]), strict=True):
        used = [t for t in range(len(b)) if t not in padding]
        assert torch.equal(a[used], b[used])
        assert a[padding].isnan().all()
        assert not b[padding].any()
    assert torch.equal(got[3], expected[3])


def test_what_it_does_not_take():
    q, ring = torch.zeros(1, 40000, 16), (torch.zeros(1, 40000, 2, 16), torch.zeros(1, 40000, 2, 16))
    count = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="a state has 40000 parts; with recent backend 'triton' takes up to 32767"):
        launches.decode(q, q, q, None, torch.zeros(1, 40000, 16, 16), None, 1.0, False, *ring, count)
    ring = torch.zeros(1, 1, 2, 16, dtype=torch.float64)
    with pytest.raises(
        TypeError, match="recent has dtype float64; backend 'triton' takes bfloat16, float16 and float32"
    ):
        launches.fold(torch.zeros(1, 1, 16, 16), None, None, None, ring, ring, count)


def launched(
    chip: str, width: int, dtype: torch.dtype, state_dtype: torch.dtype, *, N: int = 3, S: int = 9,
    only_commit: bool = False,
) -> list[Launch]:  # fmt: skip
    """Decode, verify as chains and as trees, commit, fold, and what a prefill has beside that."""
    H, T, R = 64, 4 * N, 16

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = tensor(T, H, 3 * width).split(width, 2)
    state, log_decay = tensor(S, H, width, width, dtype=state_dtype), tensor(H, dtype=FP32)
    slots, cuts, parents = (tensor(n, dtype=torch.int32) for n in (N, N + 1, T))
    accepted = tensor(T, dtype=torch.bool)
    ring = RecentTokens(*(tensor(S, H, R, width) for _ in range(2)), tensor(S, dtype=torch.int32))
    ring = ring.k, ring.v, ring.count

    def commit() -> None:
        launches.commit(k, v, log_decay, state, cuts, accepted, slots, *ring)

    def run() -> None:
        launches.decode(q[:N], k[:N], v[:N], log_decay, state, slots, 1.0, False, *ring)
        launches.verify(q, k, v, log_decay, state, cuts, slots, None, 1.0, *ring)
        launches.verify(q, k, v, log_decay, state, cuts, slots, parents, 1.0, *ring)
        commit()
        launches.fold(state, log_decay, slots, None, *ring)
        launches._parted(cuts, slots, None)
        launches._decode_singles(q, k, v, log_decay, state, slots, cuts, 1.0, *ring, torch.empty_like(v))

    found = launched_by(commit if only_commit else run, CHIPS[chip])
    for launch in found:
        print(launch)
    return found


def names(kind: str) -> list[str]:
    """What they launch, with kernels of this kind where there are two."""
    decode, verify, commit = (f"{x}_{kind}_kernel" for x in ("decode", "verify", "commit"))
    return [decode, verify, "verify_recent_kernel", commit, "fold_kernel", "part_kernel", decode]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiles_and_fits(chip: str):
    found = launched(chip, 128, BF16, FP32)
    assert [x.name for x in found] == names("ring")
    assert all(x.shared <= 32768 and x.stack <= 128 for x in found)


def test_compiles_for_amd():
    found = launched("gfx942", 128, BF16, FP32)
    assert [x.name for x in found] == names("recent")
    assert all(x.shared <= 65536 for x in found)


@pytest.mark.parametrize(("width", "state_dtype"), [(128, FP32), (128, BF16), (128, FP16), (64, FP32)])
def test_on_hopper(width: int, state_dtype: torch.dtype):
    """Next to nothing spills in the kernels for it; decode copies its part of a state 16 bytes at a time."""
    found = [x for x in launched("sm_90", width, BF16, state_dtype, N=256) if x.name.endswith("ring_kernel")]
    assert len(found) >= 3
    assert all(x.stack <= 16 * x.name.startswith("commit") for x in found)
    decode = found[0]
    columns = decode.constants["TILE"].columns
    assert decode.registers <= {32: 128, 64: 152}[columns]
    assert decode.compiled.asm["ptx"].count("cp.async.cg") == width * columns * state_dtype.itemsize // (16 * 32)


@pytest.mark.parametrize("width", [20, 256])
def test_widths_of_the_portable_kernels(width: int):
    found = launched("sm_90", width, BF16, FP32)
    assert [x.name for x in found] == names("recent")


@pytest.mark.parametrize("state_dtype", [FP32, BF16])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_commit_on_nvidia_chips(chip: str, state_dtype: torch.dtype):
    """Five programs a multiprocessor, that copy states 16 bytes at a time; next to nothing spills."""
    (commit,) = launched(chip, 128, BF16, state_dtype, only_commit=True)
    assert commit.name == "commit_ring_kernel"
    assert commit.registers <= 96
    assert commit.shared <= 32768
    assert commit.compiled.asm["ptx"].count("cp.async.cg") == 128 * 128 * state_dtype.itemsize // (16 * 128)
    assert commit.stack <= 32, commit


def test_another_batch_or_pool_compiles_nothing():
    first = [x.compiled for x in launched("sm_90", 16, BF16, FP32)]
    for N, S in ((1, 1), (16, 17), (31, 2**26)):
        assert [x.compiled for x in launched("sm_90", 16, BF16, FP32, N=N, S=S)] == first, (N, S)
