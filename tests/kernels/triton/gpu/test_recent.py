"""Rings of recent tokens on a GPU: in bfloat16, captured and replayed past two turns of a ring, and past 2^31."""

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    RecentTokens,
    decay,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_fold,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from tests.kernels.triton.support.device import DEVICE, counting_compilations, needs_gpu, no_waiting, room_for
from tests.support import ReferencePool, budget, relative_error
from tests.support.problem import cumulative
from tests.support.rings import Walk, copied, walk, whole

pytestmark = needs_gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "of",
    [
        Walk(S=9, R=16),
        Walk(S=9, H=16, Hk=4, D=128, E=128, R=16),
        Walk(D=64, E=80, R=7, rate="slow"),
        Walk(D=20, E=130, R=3, rate="no memory"),
        Walk(H=1, Hk=1, D=256, E=256, R=16, rate="none"),
        Walk(R=1),
        Walk(H=3, Hk=3, R=64),
    ],
    ids=lambda of: f"{of.rate}-{of.H}-{of.D}-{of.E}-{of.R}",
)
def test_walks_in_float32(of: Walk):
    walk(of, 300, device=DEVICE, look_every=5)


@pytest.mark.parametrize("state_dtype", [FP32, BF16])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("ring_dtype", ["the tokens'", "float32"])
def test_walks_in_half_precision(ring_dtype: str, dtype: torch.dtype, state_dtype: torch.dtype):
    of = Walk(
        S=9, H=8, Hk=8, D=128, E=128, R=16, dtype=dtype, ring_dtype=FP32 if ring_dtype == "float32" else dtype,
        state_dtype=state_dtype, operations=("decode", "decode", "decode", "verify", "commit", "fold"),
    )  # fmt: skip
    walk(of, 200, device=DEVICE, tolerance=budget(dtype if state_dtype == FP32 else BF16), look_every=5)


def _pool(N: int, H: int, D: int, state_dtype: torch.dtype, R: int = 16) -> tuple[Tensor, RecentTokens, Tensor]:
    pool = torch.randn(N, H, D, D, device=DEVICE).to(state_dtype)
    return pool, RecentTokens.empty(N, H, D, D, R, BF16, DEVICE), decay.alibi(H).to(DEVICE)


@pytest.mark.parametrize(("state_dtype", "N", "H"), [(FP32, 3, 64), (FP32, 40, 64), (BF16, 3, 8), (BF16, 40, 64)])
def test_a_captured_step_replayed(state_dtype: torch.dtype, N: int, H: int):
    """Past two turns of the ring, with other tokens and slots each time: outputs, states, and how many are written."""
    torch.manual_seed(0)
    D, R = 128, 16
    pool, recent, log_decay = _pool(N + 2, H, D, state_dtype)
    reference = ReferencePool(pool.cpu(), log_decay.cpu(), 0.5)
    q, k, v = torch.randn(3, N, H, D, device=DEVICE).to(BF16)
    slots = torch.full((N,), -1, device=DEVICE)

    def step() -> Tensor:
        return lightning_attention_decode(q, k, v, log_decay, pool, slots=slots, scale=0.5, recent=recent)

    step()  # compiled now; a batch of padding
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for n in range(2 * R + 5):
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape))
        rows = torch.randperm(N + 2)[:N]
        rows[n % N] = -1
        slots.copy_(rows)
        before = pool.clone()
        graph.replay()
        expected = reference.decode(q.cpu(), k.cpu(), v.cpu(), rows.tolist())
        assert relative_error(out.cpu(), expected) <= budget(BF16), n
        written = (pool != before).flatten(2).any(2).sum(1)
        assert written.max() <= -(-H // R)
        assert int(written.sum()) >= (N - 1) * (H // R)
    assert relative_error(whole(pool, recent, log_decay).cpu(), reference.stacked()) <= budget(state_dtype)


def test_a_captured_prefill_replayed():
    """Single tokens that are appended, prompts that fold what was appended to their rows, and reused rows."""
    torch.manual_seed(0)
    S, N, T, H, D = 9, 6, 200, 8, 64
    pool, recent, log_decay = _pool(S, H, D, FP32)
    reference = ReferencePool(pool.cpu(), log_decay.cpu())
    q, k, v = torch.randn(3, T, H, D, device=DEVICE).to(BF16)
    cuts, slots = torch.zeros(N + 1, device=DEVICE, dtype=torch.int32), torch.full((N,), -1, device=DEVICE)
    fresh = torch.zeros(N, dtype=torch.bool, device=DEVICE)

    def step() -> Tensor:
        return lightning_attention_prefill(
            q, k, v, log_decay, pool, cu_seqlens=cuts, slots=slots, fresh=fresh, recent=recent
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for n in range(40):
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape))
        lengths = [1, 1, 1, 1, n % 3, (n * 37) % 150]
        rows, new = torch.randperm(S)[:N], torch.rand(N) < 0.1
        rows[n % N] = -1
        cuts.copy_(torch.tensor([0, *lengths]).cumsum(0))
        slots.copy_(rows)
        fresh.copy_(new)
        graph.replay()
        total = sum(lengths)
        tokens = (x[:total].cpu() for x in (q, k, v))
        expected = reference.prefill(*tokens, lengths, rows.tolist(), new.tolist())
        assert relative_error(out[:total].cpu(), expected) <= budget(BF16), n
        assert not out[total:].any()
    assert recent.count.any()
    assert relative_error(whole(pool, recent, log_decay).cpu(), reference.stacked()) <= budget(BF16)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_float32_state_is_that_of_no_ring(dtype: torch.dtype):
    """After decoding, drafts and folding, however they came."""
    torch.manual_seed(0)
    N, H, D = 5, 16, 128
    pool = torch.randn(N, H, D, D, device=DEVICE)
    plain, log_decay = pool.clone(), decay.alibi(H).to(DEVICE)
    recent = RecentTokens.empty(N, H, D, D, dtype=dtype, device=DEVICE)
    cuts = torch.arange(N + 1, device=DEVICE) * 4
    for step in range(50):
        q, k, v = torch.randn(3, 4 * N, H, D, device=DEVICE).to(dtype)
        for state, options in ((pool, {"recent": recent}), (plain, {})):
            if step % 5 == 4:
                accepted = torch.arange(4 * N, device=DEVICE) % 4 <= step % 4
                lightning_attention_commit(k, v, log_decay, state, cu_seqlens=cuts, accepted=accepted, **options)
            else:
                lightning_attention_decode(q[:N], k[:N], v[:N], log_decay, state, **options)
        if step % 17 == 16:
            lightning_attention_fold(pool, recent, log_decay, slots=torch.tensor([3, -1, 1], device=DEVICE))
    lightning_attention_fold(pool, recent, log_decay)
    assert relative_error(pool, plain) < 5e-7


def test_a_ring_of_one_place():
    """All is folded in each step: the states are those of plain decoding."""
    torch.manual_seed(0)
    pool, recent, log_decay = _pool(3, 8, 64, FP32, R=1)
    plain = pool.clone()
    for _ in range(4):
        q, k, v = torch.randn(3, 3, 8, 64, device=DEVICE).to(BF16)
        lightning_attention_decode(q, k, v, log_decay, plain)
        lightning_attention_decode(q, k, v, log_decay, pool, recent=recent)
        assert relative_error(pool, plain) < 5e-7


@pytest.mark.parametrize("state_dtype", [FP32, BF16])
def test_how_many_others_there_are_changes_no_bit(state_dtype: torch.dtype):
    torch.manual_seed(0)
    most, H, D = 300, 8, 128
    start, rings, log_decay = _pool(most, H, D, state_dtype)
    tokens = [torch.randn(3, most, H, D, device=DEVICE).to(BF16) for _ in range(20)]
    alone = None
    for N in (1, 7, 64, most):
        pool, recent, outs = start.clone(), copied(rings), []
        for q, k, v in tokens:
            outs.append(
                lightning_attention_decode(
                    q[:N], k[:N], v[:N], log_decay, pool, slots=torch.arange(N, device=DEVICE), batch_invariant=True,
                    recent=recent,
                )[0]
            )  # fmt: skip
        got = [*outs, pool[0], recent.k[0], recent.v[0]]
        alone = alone or got
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True)), N


def test_one_sequence_does_not_poison_another():
    torch.manual_seed(0)
    N, H, D, row = 4, 16, 128, 2
    start, rings, log_decay = _pool(N, H, D, FP32)
    others = torch.tensor([0, 1, 3], device=DEVICE)
    tokens = [torch.randn(3, N, H, D, device=DEVICE).to(BF16) for _ in range(20)]
    results = []
    for spoilt in (False, True):
        pool, recent, outs = start.clone(), copied(rings), []
        for x in tokens:
            q, k, v = x.clone()
            if spoilt:
                k[row], v[row] = torch.nan, torch.inf
            outs.append(lightning_attention_decode(q, k, v, log_decay, pool, recent=recent)[others])
        fresh, cuts = torch.arange(N, device=DEVICE) == row, torch.arange(N + 1, device=DEVICE)
        q, k, v = tokens[0]
        outs.append(lightning_attention_prefill(q, k, v, log_decay, pool, cu_seqlens=cuts, fresh=fresh, recent=recent))
        outs.append(lightning_attention_decode(q, k, v, log_decay, pool, recent=recent))
        results.append([*outs, whole(pool, recent, log_decay)])
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)


def test_a_pool_past_2_to_the_31_elements():
    H, D = 32, 128
    rows = 2**31 // (H * D * D) + 3
    room_for(rows * H * D * D * 2 / 1e9 + 1)
    pool = torch.zeros(rows, H, D, D, dtype=BF16, device=DEVICE)
    recent, log_decay = RecentTokens.empty(rows, H, D, D, device=DEVICE), decay.alibi(H).to(DEVICE)
    own = torch.tensor([rows - 1, rows // 2 + 1, 0], device=DEVICE)
    small, small_ring = (
        torch.zeros(3, H, D, D, dtype=BF16, device=DEVICE),
        RecentTokens.empty(3, H, D, D, device=DEVICE),
    )
    for _ in range(20):
        q, k, v = torch.randn(3, 3, H, D, device=DEVICE).to(BF16)
        out = lightning_attention_decode(q, k, v, log_decay, pool, slots=own, recent=recent)
        assert torch.equal(out, lightning_attention_decode(q, k, v, log_decay, small, recent=small_ring))
    lightning_attention_fold(pool, recent, log_decay, slots=own)
    lightning_attention_fold(small, small_ring, log_decay)
    assert torch.equal(pool[own], small)
    pool[own] = 0
    assert not any(part.any() for part in pool.split(64))  # nothing else was touched


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "D", "E", "R"),
    [
        (BF16, FP32, 128, 128, 16),
        (FP32, FP32, 64, 256, 16),
        (FP16, FP16, 64, 64, 5),
        (BF16, BF16, 128, 32, 3),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_some_of_many_drafts(dtype: torch.dtype, state_dtype: torch.dtype, D: int, E: int, R: int):
    """None, few and more than a ring has places for, accepted here and there; the rejected ones are NaN."""
    torch.manual_seed(0)
    S, H, lengths, slots = 6, 16, [0, 1, 4, 20, 7, 2], [3, 1, 0, 5, -1, 2]
    cuts, where = cumulative(lengths).to(DEVICE), torch.tensor(slots, device=DEVICE)
    pool, log_decay = torch.randn(S, H, D, E).to(state_dtype), decay.alibi(H)
    reference = ReferencePool(pool, log_decay)
    pool, log_decay, recent = pool.to(DEVICE), log_decay.to(DEVICE), RecentTokens.empty(S, H, D, E, R, dtype, DEVICE)
    recent.k.fill_(torch.nan)
    recent.v.fill_(torch.nan)
    for step in range(40):
        k, v = torch.randn(sum(lengths), 8, D).to(dtype), torch.randn(sum(lengths), H, E).to(dtype)
        accepted = torch.rand(sum(lengths)) < step % 5 / 4  # none, and all, now and then
        k[~accepted] = torch.nan
        v[~accepted] = torch.nan
        count = recent.count.clone()
        lightning_attention_commit(
            k.to(DEVICE), v.to(DEVICE), log_decay, pool, cu_seqlens=cuts, accepted=accepted.to(DEVICE), slots=where,
            recent=recent,
        )  # fmt: skip
        reference.commit(k, v, lengths, slots, accepted.tolist())
        assert int(recent.count.max()) < 2 * R
        for n, slot in enumerate(slots):
            if slot >= 0:
                taken = int(accepted[sum(lengths[:n]) : sum(lengths[: n + 1])].sum())
                assert (int(recent.count[slot]) - int(count[slot]) - taken) % R == 0
        if step % 3 == 2:
            error = relative_error(whole(pool, recent, log_decay).cpu(), reference.stacked())
            assert error <= (5e-6 if state_dtype == FP32 else 2 * budget(state_dtype)), (step, error)


def _all(N: int, padding: int, pool: Tensor, recent: RecentTokens, log_decay: Tensor) -> None:
    H, D = pool.shape[1:3]
    q, k, v = torch.randn(3, 2 * N + padding, H, D, device=DEVICE).to(BF16)
    slots, cuts = torch.arange(N, device=DEVICE), torch.arange(N + 1, device=DEVICE) * 2
    accepted = torch.ones(len(q), dtype=torch.bool, device=DEVICE)
    packed = {"cu_seqlens": cuts, "slots": slots, "recent": recent}
    lightning_attention_decode(q[:N], k[:N], v[:N], log_decay, pool, slots=slots, recent=recent)
    lightning_attention_verify(q, k, v, log_decay, pool, **packed)
    lightning_attention_commit(k, v, log_decay, pool, accepted=accepted, **packed)
    lightning_attention_prefill(q, k, v, log_decay, pool, **packed)
    lightning_attention_fold(pool, recent, log_decay, slots=slots)


def test_other_sizes_compile_nothing():
    pool, recent, log_decay = _pool(7, 4, 64, BF16)
    _all(2, 3, pool, recent, log_decay)
    with counting_compilations() as compiled:
        for N, padding in ((1, 0), (7, 1), (3, 30)):
            _all(N, padding, pool, recent, log_decay)
    assert not compiled


@pytest.mark.parametrize("state_dtype", [FP32, BF16])
def test_more_sequences_compile_nothing(state_dtype: torch.dtype):
    """64 states of 64 heads are read by programs of other sizes than one is."""
    pool, recent, log_decay = _pool(64, 64, 64, state_dtype)
    _all(1, 0, pool, recent, log_decay)
    with counting_compilations() as compiled:
        _all(64, 0, pool, recent, log_decay)
    assert not compiled


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_is_read_on_the_host():
    pool, recent, log_decay = _pool(7, 4, 64, BF16)
    _all(2, 3, pool, recent, log_decay)
    with no_waiting():
        _all(2, 3, pool, recent, log_decay)


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, recent: RecentTokens) -> Tensor:
    return lightning_attention_decode(q * 2, k, v, log_decay, state, recent=recent) + 1


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of PyTorch
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled(mode: str | None):
    pool, recent, log_decay = _pool(3, 4, 64, FP32, R=3)
    same, same_ring = pool.clone(), copied(recent)
    compiled = torch.compile(_step, fullgraph=True, mode=mode)
    q, k, v = torch.randn(3, 3, 4, 64, device=DEVICE).to(BF16)
    for _ in range(5):  # a graph is captured at the second call and replayed at the third
        out = compiled(q, k, v, log_decay, pool, recent).clone()
        assert torch.equal(out, _step(q, k, v, log_decay, same, same_ring))
    assert torch.equal(pool, same)
    assert torch.equal(recent.count, same_ring.count)
