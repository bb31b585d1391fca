"""Decoding with the kernel: interpreted on the CPU against float64, and compiled for chips that are not here."""

import pytest
import torch
from torch import Tensor

from lightning_attention.kernels.triton.decode import decode
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.offline import CHIPS, Launch, launched_by
from tests.kernels.triton.support.serving import (
    DECODED,
    assert_all_but_padding,
    assert_right,
    bits,
    case,
    into_out,
    make_call,
    with_kernels,
)

BF16, FP32 = torch.bfloat16, torch.float32


@interpreted
@pytest.mark.parametrize("name", DECODED)
def test_against_float64(interpreter: Interpreter, name: str):
    call = case(DECODED, name)
    assert_right("decode", call, *interpreter.call(with_kernels, "decode", call))


@interpreted
def test_into_out_without_padding(interpreter: Interpreter):
    call = case(DECODED, "padding, and the last row")
    expected, pool = interpreter.call(with_kernels, "decode", call)
    returned, out, state = interpreter.call(into_out, "decode", call)
    assert returned is None
    assert_all_but_padding(call, out, expected)
    assert torch.equal(bits(state), bits(pool))


@interpreted
def test_without_slots_row_i_is_sequence_i(interpreter: Interpreter):
    call = make_call([1, 1, 1])
    assert_right("decode", call, *interpreter.call(with_kernels, "decode", call, True))


@interpreted
def test_no_sequences(interpreter: Interpreter):
    call = make_call([], [])
    out, _ = interpreter.call(with_kernels, "decode", call)
    assert out.shape == (0, 2, 16)


@interpreted
def test_index_tensors_and_decays_may_be_strided(interpreter: Interpreter):
    call = make_call([1, 1, 1], [5, 0, 2], H=3)
    expected = interpreter.call(with_kernels, "decode", call)
    got = interpreter.call(_with_strided_slots_and_decay, call)
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(got, expected, strict=True))


def _with_strided_slots_and_decay(call) -> tuple[Tensor, Tensor]:
    assert call.log_decay is not None
    state, slots = call.state(), torch.stack([call.indices(call.slots)] * 2, 1)[:, 0]
    log_decay = torch.stack([call.log_decay] * 2, 1)[:, 0]
    assert not slots.is_contiguous()
    assert not log_decay.is_contiguous()
    return decode(call.q, call.k, call.v, log_decay, state, slots, 1.0, False), state


def test_states_are_copied_16_bytes_at_a_time_whichever_way_they_lie():
    q, k, v = torch.empty(8, 4, 3 * 128, dtype=BF16, device="meta").split(128, 2)
    log_decay, slots = torch.empty(4, device="meta"), torch.empty(8, dtype=torch.int32, device="meta")
    pool = torch.empty(9, 4, 128, 128, device="meta")

    def compiled(state: Tensor) -> str:
        (launch,) = launched_by(lambda: decode(q, k, v, log_decay, state, slots, 1.0, False), CHIPS["sm_90"])
        return launch.compiled.asm["ptx"]

    rows, columns = compiled(pool), compiled(pool.mT)
    for instruction in ("ld.global.v4", "st.global.v4"):
        assert columns.count(instruction) == rows.count(instruction) > 0


def test_what_it_does_not_take():
    q = torch.zeros(1, 1, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match="q has dtype float64; backend 'triton' takes"):
        decode(q, q, q, None, torch.zeros(1, 1, 16, 16), None, 1.0, False)
    q = torch.zeros(1, 1, 257)
    with pytest.raises(ValueError, match="D is 257; backend 'triton' takes up to 256"):
        decode(q, q, q, None, torch.zeros(1, 1, 257, 257), None, 1.0, False)


def launched(
    chip: str, D: int, E: int, dtype: torch.dtype, state_dtype: torch.dtype, *, N: int = 3, S: int = 9, packed: int = 1,
    batch_invariant: bool = False,
) -> Launch:  # fmt: skip
    H = 4

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = tensor(N, packed, H, 2 * D + E)[:, 0].split([D, D, E], 2)
    state, slots = tensor(S, H, D, E, dtype=state_dtype), tensor(N, dtype=torch.int32)
    log_decay = tensor(H, dtype=FP32)
    (launch,) = launched_by(lambda: decode(q, k, v, log_decay, state, slots, 1.0, batch_invariant), CHIPS[chip])
    print(launch)
    return launch


@pytest.mark.parametrize("state_dtype", [FP32, BF16])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_and_fits(chip: str, state_dtype: torch.dtype):
    launch = launched(chip, 128, 128, BF16, state_dtype)
    assert launch.shared <= 4096
    assert launch.stack <= 16  # one number a thread is on sm_80, by Triton 3.6


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("state_dtype", [FP32, BF16])
def test_on_hopper(state_dtype: torch.dtype, width: int):
    """Nothing spills, whole vectors go both ways, and programs enough fit to keep 48 KB a multiprocessor in flight."""
    launch = launched("sm_90", width, width, BF16, state_dtype)
    assert launch.stack == 0
    ptx = launch.compiled.asm["ptx"]
    tile = width * launch.constants["TILE"].columns * state_dtype.itemsize
    assert ptx.count("ld.global.v4.b32") == ptx.count("st.global.v4.b32") == tile // (16 * 128)
    programs = 65536 // (launch.registers * 32 * launch.compiled.metadata.num_warps)
    assert programs * tile >= 48 << 10


def test_another_batch_or_pool_compiles_nothing():
    first = launched("sm_90", 16, 16, BF16, FP32).compiled
    for N, S, packed in ((1, 1, 1), (16, 17, 1), (1000, 2**26, 3), (2, 3, 5)):
        assert launched("sm_90", 16, 16, BF16, FP32, N=N, S=S, packed=packed).compiled is first, (N, S, packed)


def test_how_many_others_there_are_changes_no_sum():
    """With batch_invariant: the order in which a program sums over D is that of its tile."""
    for batch_invariant, count in ((True, 1), (False, 3)):
        numbers = (1, 100, 1000)
        tiles = {
            launched("sm_90", 128, 128, BF16, FP32, N=N, batch_invariant=batch_invariant).constants["TILE"]
            for N in numbers
        }
        assert len(tiles) == count
