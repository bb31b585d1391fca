"""Drafts with the kernels: interpreted on the CPU against float64, and compiled for chips that are not here."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention.kernels.triton.speculative import commit, verify
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.offline import CHIPS, Launch, launched_by
from tests.kernels.triton.support.serving import (
    COMMITTED,
    VERIFIED,
    Call,
    arguments,
    assert_all_but_padding,
    assert_right,
    bits,
    case,
    into_out,
    make_call,
    with_kernels,
)
from tests.support import ReferencePool, relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@interpreted
@pytest.mark.parametrize("name", VERIFIED)
def test_verify_against_float64(interpreter: Interpreter, name: str):
    call = case(VERIFIED, name)
    out, state = interpreter.call(with_kernels, "verify", call)
    assert_right("verify", call, out, state)
    if name == "trees":  # the tree is looked at: as chains the answer is another
        chains, _ = interpreter.call(with_kernels, "verify", replace(call, parents=None))
        assert relative_error(chains, out) > 0.1


@interpreted
@pytest.mark.parametrize("name", ["chains", "a tree level by level", "nothing but padding"])
def test_verify_into_out_without_padding(interpreter: Interpreter, name: str):
    call = case(VERIFIED, name)
    expected, _ = interpreter.call(with_kernels, "verify", call)
    returned, out, _ = interpreter.call(into_out, "verify", call)
    assert returned is None
    assert_all_but_padding(call, out, expected)


def _with_snapshots(call: Call, rows: Tensor, snapshots: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the pool, and the states after drafts, which are in the pool where ``snapshots`` is None."""
    state = call.state()
    given = arguments("verify", call, state)
    kept = state if snapshots is None else snapshots
    out = verify(*given, kept, rows)
    return out, state, kept


@interpreted
@pytest.mark.parametrize("name", ["chains", "trees", "no decay, columns first"])
@pytest.mark.parametrize("where", ["the pool", "another", "columns first", "float16"])
def test_the_state_after_each_draft(interpreter: Interpreter, where: str, name: str):
    call = case(VERIFIED, name)
    P, used = max(call.lengths), [slot for slot in call.slots if slot >= 0]
    snapshots = None
    if where != "the pool":
        snapshots = torch.full((20, *call.pool.shape[1:]), torch.nan)
        snapshots = snapshots.mT.contiguous().mT if where == "columns first" else snapshots
        snapshots = snapshots.half() if where == "float16" else snapshots
        rows = torch.arange(len(call.lengths) * P, dtype=torch.int32).view(-1, P) % 20
    else:  # a row for each sequence's first draft, and the last for one of another
        rows = torch.full((len(call.lengths), P), -1)
        rows[:, 0] = torch.tensor(call.slots)
        rows[0, 1] = next(row for row in range(len(call.pool)) if row not in used)
    out, state, kept = interpreter.call(_with_snapshots, call, rows, snapshots)
    reference = ReferencePool(call.pool, call.log_decay, call.scale)
    want = reference.verify(call.q, call.k, call.v, call.lengths, call.slots, call.parents)
    assert relative_error(out[: sum(call.lengths)], want[: sum(call.lengths)]) <= 1e-5
    found, t = 0, 0
    for n, length in enumerate(call.lengths):
        for i in range(length):
            after, row = reference.after_drafts[t], int(rows[n, i])
            t += 1
            if after is not None and row >= 0:
                assert relative_error(kept[row], after) <= (6e-4 if where == "float16" else 2e-6)
                found += 1
    assert found
    if snapshots is not None:
        assert int(kept.flatten(1).isnan().all(1).sum()) == 20 - found
        assert torch.equal(bits(state), bits(call.pool))


@interpreted
@pytest.mark.parametrize("name", COMMITTED)
def test_commit_against_float64(interpreter: Interpreter, name: str):
    call = case(COMMITTED, name)
    assert_right("commit", call, *interpreter.call(with_kernels, "commit", call))


@interpreted
def test_without_slots_row_i_is_sequence_i(interpreter: Interpreter):
    call = make_call([2, 0, 3], accepted=[True, False, True, True, True])
    for operation in ("verify", "commit"):
        assert_right(operation, call, *interpreter.call(with_kernels, operation, call, True))


def _decoded(call: Call) -> tuple[Tensor, Tensor]:
    """The accepted tokens of the one sequence one by one: outputs, and the pool."""
    from lightning_attention.kernels.triton.decode import decode

    assert call.accepted is not None
    state, slots = call.state(), call.indices(call.slots)
    steps = [
        decode(call.q[t, None], call.k[t, None], call.v[t, None], call.log_decay, state, slots, call.scale, False)
        for t in range(len(call.q))
        if call.accepted[t]
    ]
    return torch.cat(steps), state


@interpreted
def test_the_bits_of_decoding(interpreter: Interpreter):
    call = make_call([5], [6], D=48, E=80, accepted=[True, True, True, False, True])
    out, decoded = interpreter.call(_decoded, call)
    _, committed = interpreter.call(with_kernels, "commit", call)
    verified, _ = interpreter.call(with_kernels, "verify", call)
    assert torch.equal(bits(committed), bits(decoded))
    assert torch.equal(verified[:3], out[:3])


@interpreted
def test_parents_that_are_wrong_do_no_harm(interpreter: Interpreter):
    """Nobody reads them on a GPU: the call ends, other sequences get their answers, and the pool is left alone."""
    call = make_call([4, 3], [1, 6], parents=[3, 2**30, -5, 3, -1, 0, 0])
    out, state = interpreter.call(with_kernels, "verify", call)
    alone = replace(call, lengths=[0, 3], parents=call.parents[4:], **{x: getattr(call, x)[4:] for x in "qkv"})
    assert_right("verify", alone, out[4:], state)
    assert out[:4].isfinite().all()


@st.composite
def batches(draw: st.DrawFn) -> Call:
    """Sequences of up to 9 drafts, some empty, some padding, a tree each, and one path of it accepted."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 4, 9]), min_size=1, max_size=3))
    rows = draw(st.permutations(range(7)))
    parents, accepted = [], []
    for length in lengths:
        own = [draw(st.integers(-1, i - 1)) for i in range(length)]
        path, at = set(), draw(st.integers(-1, length - 1))
        while at >= 0:
            path.add(at)
            at = own[at]
        parents += own
        accepted += [i in path for i in range(length)]
    return make_call(
        lengths, [rows[n] if draw(st.integers(0, 4)) else -1 for n in range(len(lengths))], H=1, D=20, E=5,
        parents=parents, accepted=accepted, padding=draw(st.sampled_from([0, 3])), seed=draw(st.integers(0, 2**16)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )  # fmt: skip


@interpreted
@settings(max_examples=10)
@given(call=batches())
def test_any_batch(interpreter: Interpreter, call: Call):
    for operation in ("verify", "commit"):
        assert_right(operation, call, *interpreter.call(with_kernels, operation, call))


PORTABLE = ["verify_kernel", "verify_kernel", "commit_kernel"]


def launched(
    chip: str, D: int, dtype: torch.dtype, state_dtype: torch.dtype, *, N: int = 3, T: int = 12, S: int = 9
) -> list[Launch]:
    """Verify as chains, as trees, and commit."""
    H = 4

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = tensor(T, H, 3 * D).split(D, 2)
    state, log_decay, accepted = (
        tensor(S, H, D, D, dtype=state_dtype),
        tensor(H, dtype=FP32),
        tensor(T, dtype=torch.bool),
    )
    slots, cu_seqlens, parents = (tensor(n, dtype=torch.int32) for n in (N, N + 1, T))

    def run() -> None:
        verify(q, k, v, log_decay, state, cu_seqlens, slots, None, 1.0)
        verify(q, k, v, log_decay, state, cu_seqlens, slots, parents, 1.0)
        commit(k, v, log_decay, state, cu_seqlens, accepted, slots)

    launches = launched_by(run, CHIPS[chip])
    for launch in launches:
        print(launch)
    return launches


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_and_fits(chip: str):
    """In Gluon for chains in 16 bits and NVIDIA chips."""
    in_gluon, short = chip.startswith("sm"), launched(chip, 128, BF16, FP32)
    names = ["verify_ring_kernel", "verify_kernel", "commit_state_kernel"]
    assert [x.name for x in short] == (names if in_gluon else PORTABLE)
    whole = launched(chip, 128, FP32, FP32)
    assert [x.name for x in whole] == PORTABLE
    assert all(x.shared <= 16384 and x.stack == 0 for x in short + whole)


@pytest.mark.parametrize(("D", "state_dtype"), [(64, FP32), (128, FP32), (64, BF16), (128, BF16), (128, FP16)])
def test_many_programs_of_gluon_fit_on_a_multiprocessor(D: int, state_dtype: torch.dtype):
    dtype = FP16 if state_dtype == FP16 else BF16
    verify, _, commit = launched("sm_90", D, dtype, state_dtype)
    assert verify.registers <= 96
    assert commit.registers <= 80
    assert verify.stack == commit.stack == commit.shared == 0


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("tree", [False, True])
def test_states_after_drafts_compile_and_fit(tree: bool, columns_first: bool, chip: str):
    """To another pool of another type, and to the pool itself: one store more a draft, without spilling."""
    H, N, P, width = 4, 3, 4, 128

    def tensor(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = tensor(N * P, H, 3 * width).split(width, 2)
    pools = [tensor(9, H, width, width, dtype=dtype) for dtype in (FP32, BF16)]
    state, other = [x.mT for x in pools] if columns_first else pools
    cuts, slots, rows = (tensor(*n, dtype=torch.int32) for n in ((N + 1,), (N,), (N, P)))
    parents = tensor(N * P, dtype=torch.int32) if tree else None

    def run() -> None:
        for snapshots in (other, state):
            verify(q, k, v, tensor(H, dtype=FP32), state, cuts, slots, parents, 1.0, snapshots, rows)

    launches = launched_by(run, CHIPS[chip])
    assert len(launches) == 2
    assert all(x.shared <= 16384 and x.stack == 0 for x in launches)


@pytest.mark.parametrize(("width", "state_dtype"), [(128, BF16), (256, FP32), (256, BF16)])
def test_nothing_spills_on_hopper(width: int, state_dtype: torch.dtype):
    for launch in launched("sm_90", width, BF16, state_dtype):
        assert launch.stack == 0, launch
        assert launch.registers <= 168, launch


def test_another_batch_or_pool_compiles_nothing():
    first = [x.compiled for x in launched("sm_90", 16, BF16, FP32)]
    for N, T, S in ((1, 1, 1), (16, 64, 17), (1000, 4003, 2**26)):
        assert [x.compiled for x in launched("sm_90", 16, BF16, FP32, N=N, T=T, S=S)] == first, (N, T, S)
