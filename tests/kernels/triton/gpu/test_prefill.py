"""Prefill on a GPU: everything the interpreter is asked, in bfloat16 too, captured, and over pools past 2^31."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention import INVARIANT_CHUNK, LightningOutput, lightning_attention, lightning_attention_prefill
from lightning_attention.kernels.triton.backend import BACKEND
from tests.kernels.triton.support.device import DEVICE, counting_compilations, needs_gpu, no_waiting, poisoned, room_for
from tests.kernels.triton.support.device import moved as problem_on_gpu
from tests.kernels.triton.support.prefilling import Batch, assert_right, batches, make_batch, prefilled
from tests.kernels.triton.support.serving import bits, moved
from tests.support import Problem, make_problem, relative_error
from tests.support.chunks import read_in_chunks

# That mode calls itself a prototype.
pytestmark = [*needs_gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SNAPSHOTS = [[(0, 4), (1, -1)], [(64, 6), (70, 7)], [(0, 0), (1, -1)], [(700, 8), (-1, -1)]]
TOLERANCE = {BF16: 4e-3, FP16: 6e-4, FP32: 4e-6}
ROUNDING = {BF16: 3e-3, FP16: 4e-4}  # of a state to its pool


def apply(arguments: tuple[Any, ...], out: Tensor | None = None) -> Tensor:
    """The public function, on what ``Batch.arguments`` returns."""
    q, k, v, log_decay, state, cu_seqlens, slots, fresh, scale, at, to = arguments
    return lightning_attention_prefill(
        q, k, v, log_decay, state, cu_seqlens=cu_seqlens, slots=slots, fresh=fresh, scale=scale, snapshot_at=at,
        snapshot_slots=to, out=out,
    )  # fmt: skip


def run(batch: Batch) -> tuple[Tensor, Tensor]:
    """Outputs and pool, in poisoned memory."""
    state = batch.pool.clone()
    arguments = batch.arguments(state)
    with poisoned():
        out = apply(arguments)
    return out, state


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("width", [(128, 128), (64, 64), (80, 48), (256, 160), (48, 300)])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32), (FP32, FP16)]
)
def test_against_float64(dtype: torch.dtype, state_dtype: torch.dtype, width: tuple[int, int], segments: bool):
    batch = make_batch(
        [2, 70, 0, 1000, 64, 1, 65], [3, 1, 2, 5, -1, -2, 10], fresh=[False, True, True, False, False, False, False],
        snapshots=[*SNAPSHOTS, [(1, 11), (2, 12)], [(1, 13), (1, 14)], [(33, 15), (65, 16)]], rows=18, D=width[0],
        E=width[1], dtype=dtype, state_dtype=state_dtype, padding=77,
    )  # fmt: skip
    with poisoned():
        got = prefilled(moved(batch, DEVICE), segments)
    assert_right(batch, *got, max(TOLERANCE[dtype], ROUNDING.get(state_dtype, 0.0)))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("width", [(128, 128), (80, 48), (256, 160)])
@pytest.mark.parametrize("segments", [False, True])
def test_a_pool_with_columns_first_has_the_bits_of_one_with_rows(
    segments: bool, width: tuple[int, int], dtype: torch.dtype
):
    batch = make_batch(
        [1, 70, 0, 1000], [3, 1, 2, 5], snapshots=SNAPSHOTS, D=width[0], E=width[1], dtype=dtype, padding=9
    )
    with poisoned():
        out, state = prefilled(moved(batch, DEVICE), segments)
        got = prefilled(moved(batch, DEVICE), segments, columns_first=True)
    assert_right(batch, *got, TOLERANCE[dtype])
    assert relative_error(got[0], out) <= (1e-6 if dtype == FP32 else 2e-3)  # of single tokens sums over D differ
    assert torch.equal(bits(got[1]), bits(state))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_into_out_without_padding(dtype: torch.dtype, offset: int):
    """Whatever address it begins at, and at the third call of a shape, which is made from a recording."""
    batch = moved(make_batch([2, 700, 0, 1, 40], [3, -1, 2, 5, 1], D=64, E=64, dtype=dtype, padding=5), DEVICE)
    expected, _ = run(batch)
    for _ in range(4):
        out = batch.v.new_full((batch.v.numel() + offset,), torch.nan)[offset:].view(batch.v.shape)
        arguments = batch.arguments(batch.pool.clone())
        assert apply(arguments, out) is out
        used = [t for t in range(len(out)) if t not in range(2, 702) and t < 743]
        assert relative_error(out[used], expected[used]) <= (1e-5 if dtype == FP32 else 4e-3)
        rest = sorted(set(range(len(out))) - set(used))
        assert out[rest].isnan().all()


@pytest.mark.parametrize("segments", [False, True])
def test_fewer_heads_of_q_and_k(segments: bool):
    batch = make_batch([1, 700, 3], [3, 1, 2], snapshots=[[(1, 4)], [(64, 6)], [(0, 5)]], H=4, Hk=2, D=64, dtype=BF16)
    with poisoned():
        got = prefilled(moved(batch, DEVICE), segments)
    assert_right(batch, *got, TOLERANCE[BF16])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject):
    dtype = data.draw(st.sampled_from([BF16, FP16, FP32]))
    edges = (5, 63, 64, 65, 127, 129, 300)
    batch = data.draw(batches(edges=edges, D=64, E=64, H=3, dtype=dtype))
    with poisoned():
        got = prefilled(moved(batch, DEVICE), data.draw(st.booleans()))
    # Of few terms, forgotten at once, the rounding of one stands alone.
    assert_right(batch, *got, 1.5 * TOLERANCE[dtype])


@pytest.mark.parametrize("width", [128, 64])
def test_more_sequences_than_places(width: int):
    batch = make_batch([70, 64, 2, 1, 129] * 20, rows=100, D=width, E=width, dtype=BF16, padding=9)
    for segments in (False, True):
        assert_right(batch, *prefilled(moved(batch, DEVICE), segments), TOLERANCE[BF16])


def test_long_and_short_ones_as_training_has_them():
    """200 single tokens, two chunks and a long prompt, against ``lightning_attention`` on each."""
    lengths = [1] * 200 + [700, 4096, 20000]
    batch = moved(make_batch(lengths, rows=len(lengths), H=4, D=128, E=128, dtype=BF16, scale=1.0), DEVICE)
    out, state = run(batch)
    start = 0
    for n in (0, 117, 200, 201, 202):
        start = sum(lengths[:n])
        own = slice(start, start + lengths[n])
        expected, final = lightning_attention(
            batch.q[None, own], batch.k[None, own], batch.v[None, own], batch.log_decay,
            initial_state=batch.pool[n : n + 1], output_final_state=True,
        )  # fmt: skip
        assert relative_error(out[own], expected[0]) <= 4e-3
        assert relative_error(state[n], final[0]) <= 2e-3


def test_a_captured_call_heeds_new_contents():
    """Lengths, slots, fresh, snapshots, tokens and the pool change between replays; the graph does not."""
    sizes = {"H": 4, "D": 128, "E": 128, "dtype": BF16}
    contents = [
        make_batch([100, 1, 200, 0], [0, 1, 2, 3], fresh=[True, False, False, False],
                   snapshots=[[(64, 4)], [(1, 5)], [(-1, -1)], [(0, 6)]], padding=99, seed=1, **sizes),
        make_batch([1, 1, 1, 397], [8, 2, -1, 1], fresh=[False, True, False, False],
                   snapshots=[[(0, -1)], [(1, 5)], [(1, 0)], [(300, 6)]], seed=2, **sizes),
        make_batch([0, 0, 0, 0], [3, 2, 1, 0], fresh=[True, False, False, True],
                   snapshots=[[(0, 4)], [(0, 5)], [(1, 6)], [(0, 7)]], padding=400, seed=3, **sizes),
    ]  # fmt: skip
    first = moved(contents[0], DEVICE)
    state = first.pool.clone()
    fixed = first.arguments(state)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        apply(fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = apply(fixed)
    for batch in (contents[1], contents[2], contents[0]):
        new = moved(batch, DEVICE)
        state.copy_(new.pool)
        for old, value in zip(fixed, new.arguments(state), strict=True):
            if isinstance(old, Tensor) and old is not state:
                old.copy_(value)
        graph.replay()
        assert_right(batch, out, state, TOLERANCE[BF16])


def test_nothing_is_read_on_the_host_and_nothing_compiled_anew():
    sizes = {"H": 4, "D": 128, "E": 128, "dtype": BF16}
    run(moved(make_batch([100, 3], snapshots=[[(5, 4)], [(2, 5)]], fresh=[False, True], **sizes), DEVICE))
    others = [
        make_batch([1], [7], snapshots=[[(1, 3)]], fresh=[False], **sizes),
        make_batch([40000, 5, 1, 1], snapshots=[[(30000, 5)]] * 4, fresh=[True] * 4, padding=3, **sizes),
    ]
    others = [moved(replace(b, snapshots=[[(p[0], p[1] + n) for p in s] for n, s in enumerate(b.snapshots)]), DEVICE)
              for b in others]  # fmt: skip
    with counting_compilations() as compiled:
        for batch in others:
            run(batch)
    assert not compiled
    arguments = others[1].arguments(others[1].pool)
    torch.cuda.synchronize()
    with no_waiting():
        apply(arguments)


def test_a_pool_past_2_to_the_31():
    H, D = 8, 128
    rows = 2**31 // (H * D * D) + 40
    room_for(rows * H * D * D * 2 / 1e9 + 2)
    pool = torch.zeros(rows, H, D, D, dtype=BF16, device=DEVICE)
    slots = torch.tensor([rows - 1, rows - 20, 3], device=DEVICE)
    batch = moved(make_batch([1, 300, 70], rows=3, H=H, D=D, E=D, dtype=BF16, state_dtype=BF16), DEVICE)
    pool[slots] = batch.pool
    q, k, v, log_decay, small, cu_seqlens, own, *_ = batch.arguments(batch.pool.clone())
    out = lightning_attention_prefill(q, k, v, log_decay, pool, cu_seqlens=cu_seqlens, slots=slots)
    expected = lightning_attention_prefill(q, k, v, log_decay, small, cu_seqlens=cu_seqlens, slots=own)
    assert torch.equal(out, expected)
    assert torch.equal(pool[slots], small)
    pool[slots] = 0
    assert not any(part.any() for part in pool.split(64))


def test_runs_have_the_same_bits():
    batch = moved(make_batch([1, 5000, 3, 700, 64], H=8, D=128, E=128, dtype=BF16), DEVICE)
    expected = run(batch)
    for _ in range(50):
        got = run(batch)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(bits(got[1]), bits(expected[1]))


def attended(prompt: Problem, T: int) -> LightningOutput:
    """Training's forward pass of the first T tokens."""
    return lightning_attention(
        prompt.q[:, :T], prompt.k[:, :T], prompt.v[:, :T], prompt.log_decay, scale=prompt.scale,
        initial_state=prompt.initial_state, output_final_state=True, batch_invariant=True,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("dtype", "width"), [(BF16, 128), (BF16, 64), (BF16, 256), (FP16, 128), (FP32, 64)])
def test_chunks_have_the_bits_of_training(dtype: torch.dtype, width: int, seed: int):
    """Whatever else is in the calls; and a snapshot has those of a call that ended there."""
    draw, R = torch.Generator().manual_seed(seed), INVARIANT_CHUNK
    options = {"H": 8, "D": width, "dtype": dtype, "seed": seed, "initial": bool(seed)}
    for T in (int(torch.randint(2 * R, 20_000, (), generator=draw)), 3 * R, 2 * R + 1, 70, 1):
        cuts = [cut for cut in range(R, T, R) if int(torch.randint(3, (), generator=draw))]
        at = int(torch.randint(1, [*cuts, T][0] + 1, (), generator=draw)) if seed else [*cuts, T][0] // R * R
        whole = problem_on_gpu(make_problem(T=T, **options))
        with poisoned():
            out, state, snapshot = read_in_chunks(BACKEND.prefill, whole, cuts, at)
        expected, final = attended(whole, T)
        assert torch.equal(out, expected), (T, cuts)
        assert torch.equal(state, final), (T, cuts)
        if at > 0:
            assert torch.equal(snapshot, attended(whole, at).final_state), (T, at)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_call_without_tokens_takes_snapshots_and_empties_fresh_rows(batch_invariant: bool, dtype: torch.dtype):
    state = torch.randn(6, 2, 128, 128, device=DEVICE)
    before = state.clone()
    none = torch.empty(0, 2, 128, device=DEVICE, dtype=dtype)
    index = {"cu_seqlens": [0, 0, 0], "slots": [1, 2], "snapshot_at": [[0], [0]], "snapshot_slots": [[4], [5]]}
    tensors = {name: torch.tensor(values, device=DEVICE) for name, values in index.items()}
    fresh = torch.tensor([False, True], device=DEVICE)
    out = lightning_attention_prefill(
        none, none, none, None, state, **tensors, fresh=fresh, batch_invariant=batch_invariant
    )
    assert out.shape == (0, 2, 128)
    before[4], before[2], before[5] = before[1], 0, 0
    assert torch.equal(state, before)
