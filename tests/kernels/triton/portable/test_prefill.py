"""Prefill with the portable kernels: interpreted on the CPU against float64, and compiled for absent chips."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_attention.kernels.triton.prefill import prefill
from tests.kernels.triton.support.cutting import chunk_of, cutting
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.offline import CHIPS, Launch, launched_by
from tests.kernels.triton.support.prefilling import Batch, assert_right, batches, make_batch, prefilled
from tests.kernels.triton.support.serving import assert_all_but_padding, bits
from tests.support import Problem, make_problem, relative_error
from tests.support.chunks import read_in_chunks

BF16, FP32 = torch.bfloat16, torch.float32
SNAPSHOTS = [[(0, 4), (1, -1)], [(64, 6), (70, 7)], [(0, 0), (1, -1)], [(9, 8), (-1, -1)]]


@interpreted
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("state_dtype", [FP32, torch.float16])
@pytest.mark.parametrize("dtype", [FP32, torch.float16])
def test_against_float64(interpreter: Interpreter, segments: bool, dtype: torch.dtype, state_dtype: torch.dtype):
    batch = make_batch(
        [2, 70, 0, 130], [3, 1, 2, 5], fresh=[False, True, True, False], snapshots=SNAPSHOTS, D=24, E=20, dtype=dtype,
        state_dtype=state_dtype, padding=5,
    )  # fmt: skip
    assert_right(batch, *interpreter.call(prefilled, batch, segments))


@interpreted
@pytest.mark.parametrize("segments", [False, True])
def test_a_pool_with_columns_first_has_the_bits_of_one_with_rows(interpreter: Interpreter, segments: bool):
    batch = make_batch(
        [1, 70, 0, 130], [3, 1, 2, 5], fresh=[False, False, True, False], snapshots=SNAPSHOTS, D=24, E=20
    )
    out, state = interpreter.call(prefilled, batch, segments)
    transposed = interpreter.call(prefilled, batch, segments, True)
    assert_right(batch, *transposed)
    assert torch.equal(transposed[0], out)
    assert torch.equal(bits(transposed[1]), bits(state))


@interpreted
@pytest.mark.parametrize("segments", [False, True])
def test_into_out_without_padding(interpreter: Interpreter, segments: bool):
    batch = make_batch([2, 70, 0, 1, 40, 1], [3, -1, 2, 5, 1, -2], padding=5)
    expected, pool = interpreter.call(prefilled, batch, segments)
    out, state = interpreter.call(prefilled, batch, segments, False, True)
    assert_all_but_padding(batch, out, expected)
    assert torch.equal(bits(state), bits(pool))


def test_other_strides_of_a_pool_are_refused():
    q, cuts = torch.zeros(2, 1, 16), torch.tensor([0, 2])
    pool = torch.zeros(1, 1, 16, 32)[..., ::2]
    message = (
        r"state has strides \[512, 512, 32, 2\]; backend 'triton' wants each \[D, E\] contiguous, or each \[E, D\], "
        r"the last two \[16, 1\] or \[1, 16\], to prefill"
    )
    with pytest.raises(ValueError, match=message):
        prefill(q, q, q, None, pool, cuts, None, None, 1.0, None, None, False)


@interpreted
@pytest.mark.parametrize("segments", [False, True])
def test_fewer_heads_of_q_and_k(interpreter: Interpreter, segments: bool):
    batch = make_batch([1, 70], [3, 1], snapshots=[[(1, 4)], [(64, 6)]], H=4, Hk=2, padding=1)
    assert_right(batch, *interpreter.call(prefilled, batch, segments))


@interpreted
@settings(max_examples=8)
@given(batch=batches(D=20, E=5, H=1))
def test_any_batch(interpreter: Interpreter, batch: Batch):
    assert_right(batch, *interpreter.call(prefilled, batch, True))


def _decoded(batch: Batch) -> Tensor:
    """The pool after a token for every sequence."""
    from lightning_attention.kernels.triton.decode import decode

    state = batch.pool.clone()
    q, k, v, log_decay, _, _, slots, _, scale, _, _ = batch.arguments(state)
    decode(q, k, v, log_decay, state, slots, scale, False)
    return state


@interpreted
def test_single_tokens_leave_the_bits_of_decoding(interpreter: Interpreter):
    batch = make_batch([1, 1, 1], [2, -1, 5], D=24, E=20)
    _, state = interpreter.call(prefilled, batch)
    assert torch.equal(bits(state), bits(interpreter.call(_decoded, batch)))


@interpreted
def test_more_sequences_than_places(interpreter: Interpreter):
    batch = make_batch([2, 3, 33] * 12 + [0, 1, 5], rows=39, H=1, D=16)
    assert_right(batch, *interpreter.call(prefilled, batch, True))


@interpreted
def test_the_check_notices(interpreter: Interpreter):
    batch = make_batch([40, 33], snapshots=[[(32, 4)], [(32, 5)]])
    out, state = interpreter.call(prefilled, batch, True)
    assert_right(batch, out, state)
    for wrong in (
        replace(batch, slots=[1, 0]),
        replace(batch, fresh=[False, True]),
        replace(batch, snapshots=[[(31, 4)], [(32, 5)]]),
        replace(batch, scale=0.51),
        replace(batch, lengths=[41, 32]),
    ):
        with pytest.raises(AssertionError):
            assert_right(wrong, out, state)


def _pieces(batch: Batch, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Its one sequence in one call after another."""
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, len(batch.q)], strict=True):
        part = {name: getattr(batch, name)[start:stop] for name in "qkv"}
        out, pool = prefilled(replace(batch, lengths=[stop - start], **part))
        batch = replace(batch, pool=pool)
        outputs.append(out)
    return torch.cat(outputs), batch.pool


@interpreted
def test_in_pieces(interpreter: Interpreter):
    batch = make_batch([100], [2])
    whole, pool = interpreter.call(prefilled, batch)
    at_blocks, same = interpreter.call(_pieces, batch, [32, 96])  # of float32 a block has 32 rows
    assert torch.equal(at_blocks, whole[:100])
    assert torch.equal(same[2], pool[2])
    anywhere, alike = interpreter.call(_pieces, batch, [1, 4, 50])
    assert relative_error(anywhere, whole) <= 1e-6
    assert relative_error(alike[2], pool[2]) <= 1e-6


def _attended(prompt: Problem) -> tuple[Tensor, Tensor | None]:
    from lightning_attention.kernels.triton.attention import attention

    inputs = (prompt.q, prompt.k, prompt.v, prompt.log_decay, prompt.initial_state, None, prompt.scale)
    with cutting(True, prompt.q.dtype):
        return attention(*inputs, True, True)


def _read(prompt: Problem, cuts: list[int], snapshot_at: int) -> tuple[Tensor, Tensor, Tensor]:
    with cutting(True, prompt.q.dtype):
        return read_in_chunks(prefill, prompt, cuts, snapshot_at)


@interpreted
@pytest.mark.parametrize("dtype", [FP32, torch.float16])
def test_chunks_have_the_bits_of_training(interpreter: Interpreter, dtype: torch.dtype):
    """For prompts that end with a segment, a token after one, or within one; for a short one; for snapshots."""
    chunk = chunk_of(dtype)
    for T, cuts, at in (
        (2 * chunk, [chunk], -1), (2 * chunk + 1, [2 * chunk], chunk), (chunk + 9, [], chunk + 5),
        (chunk - 9, [chunk // 2], -1),
    ):  # fmt: skip
        prompt = make_problem(T=T, H=1, D=20, dtype=dtype, initial=dtype == FP32)
        out, state, snapshot = interpreter.call(_read, prompt, cuts, at)
        expected, final = interpreter.call(_attended, prompt)
        assert torch.equal(out, expected)
        assert torch.equal(state, final)
        if at > 0:
            shorter = replace(prompt, **{name: getattr(prompt, name)[:, :at] for name in "qkv"})
            assert torch.equal(snapshot, interpreter.call(_attended, shorter)[1])


NAMES = {
    "plan_kernel", "states_kernel", "scan_kernel", "snapshot_kernel", "forward_kernel", "short_kernel",
    "clear_padding_kernel",
}  # fmt: skip


def launched(
    chip: str,
    D: int,
    state_dtype: torch.dtype,
    *,
    T: int = 4096,
    N: int = 3,
    rows: int = 9,
    columns_first: bool = False,
) -> list[Launch]:
    H, P = 4, 2

    def tensor(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = tensor(T, H, 3 * D).split(D, 2)
    state, log_decay = tensor(rows, H, D, D, dtype=state_dtype), tensor(H, dtype=FP32)
    state = state.mT if columns_first else state
    cu_seqlens, slots, at, to = (tensor(*n, dtype=torch.int32) for n in ((N + 1,), (N,), (N, P), (N, P)))
    fresh = tensor(N, dtype=torch.bool)
    launches = launched_by(
        lambda: prefill(q, k, v, log_decay, state, cu_seqlens, slots, fresh, 1.0, at, to, False), CHIPS[chip]
    )
    for launch in launches:
        print(launch)
    return launches


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_compiles_and_fits(chip: str):
    names = [x.name for x in launched(chip, 128, FP32)]
    assert set(names) == NAMES
    for launch in launched(chip, 128, FP32):
        assert launch.shared <= CHIPS[chip].shared, launch
    if chip == "sm_90":
        assert all(x.stack == 0 for x in launched(chip, 128, BF16) if x.name != "forward_kernel")


@pytest.mark.parametrize("D", [64, 80, 128, 256])
def test_columns_first_costs_no_registers(D: int):
    """On Hopper no program needs more shared memory or spills more than with rows first."""
    rows, columns = (launched("sm_90", D, FP32, columns_first=first) for first in (False, True))
    for one, other in zip(rows, columns, strict=True):
        assert other.name == one.name
        assert other.shared <= one.shared, other
        assert other.stack <= one.stack, other


def test_another_batch_or_pool_compiles_nothing():
    first = [x.compiled for x in launched("sm_90", 64, FP32)]
    for T, N, rows in ((1, 1, 1), (77, 16, 17), (100_003, 1000, 2**26)):
        others = [x.compiled for x in launched("sm_90", 64, FP32, T=T, N=N, rows=rows)]
        assert others == first, (T, N, rows)
