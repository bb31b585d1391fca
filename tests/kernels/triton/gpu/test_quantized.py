"""Pools in 8 bits on a GPU: rows as plain PyTorch's, a prefill and steps captured and replayed, errors that stay."""

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    QuantizedStates,
    RecentTokens,
    decay,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_fold,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from tests.kernels.triton.support.device import DEVICE, needs_gpu, no_waiting
from tests.support import ReferencePool, budget, cumulative, relative_error
from tests.support.rings import Walk, tensors, walk, whole

pytestmark = needs_gpu
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
OUTPUTS, STATES = 1.5e-2, 3e-4  # of ``high`` and, in outputs, of 16 bits; of both planes


@pytest.mark.parametrize(("D", "E"), [(128, 128), (64, 80), (20, 130), (256, 256), (5, 3)])
def test_rows(D: int, E: int):
    """Written on the GPU as on the CPU, but for halves that are rounded the other way; NaN and inf stay visible."""
    torch.manual_seed(0)
    states, slots = torch.randn(5, 3, D, E), torch.tensor([2, -1, 0, 4, 5])
    states[0, 0] *= 1e-40
    states[2, 1, 0, 0], states[2, 1, 1, 1] = torch.inf, torch.nan
    found: list[list[Tensor]] = []
    for device in ("cpu", DEVICE):
        pool = QuantizedStates.empty(7, 3, D, E, device=device)
        pool.quantize(states.to(device), slots.to(device))
        found.append([x.cpu() for x in (pool.high, pool.low, pool.dequantize(slots.to(device)), pool.dequantize())])
    for a, b in zip(*found, strict=True):
        if a.dtype == torch.int8:
            assert (a != b).float().mean() <= 1e-3
        else:
            assert torch.equal(a.isfinite(), b.isfinite())
            assert relative_error(torch.where(b.isfinite(), b, 0), torch.where(a.isfinite(), a, 0)) <= 1e-5
    assert (~found[1][3].isfinite()).sum() == 2 * D


def test_a_captured_prefill_replayed():
    """With other lengths, slots and snapshots each time."""
    torch.manual_seed(0)
    S, H, D, T, N = 9, 4, 128, 300, 3
    states, log_decay = torch.randn(S, H, D, D), decay.alibi(H)
    pool, reference = QuantizedStates.empty(S, H, D, D, device=DEVICE), ReferencePool(states, log_decay)
    pool.quantize(states.to(DEVICE))
    q, k, v = torch.zeros(3, T, H, D, device=DEVICE, dtype=torch.bfloat16)
    cuts, slots = torch.zeros(N + 1, device=DEVICE, dtype=torch.int32), torch.full((N,), -1, device=DEVICE)
    fresh, at, to = torch.zeros(N, device=DEVICE, dtype=torch.bool), *torch.full((2, N, 1), -1, device=DEVICE)
    rate = log_decay.to(DEVICE)

    def call() -> Tensor:
        return lightning_attention_prefill(
            q, k, v, rate, pool, cu_seqlens=cuts, slots=slots, fresh=fresh, snapshot_at=at, snapshot_slots=to
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for lengths in ([100, 1, 150], [0, 290, 3], [64, 64, 64]):
        rows = torch.randperm(S).tolist()
        new, owned, starts = torch.randn(3, T, H, D).bfloat16(), [rows[0], -1, rows[1]], [False, False, True]
        marks, targets = [lengths[0] // 2, 0, lengths[2] + 1], [rows[2], rows[3], rows[4]]
        for x, values in (
            (q, new[0]), (k, new[1]), (v, new[2]), (cuts, cumulative(lengths)), (slots, torch.tensor(owned)),
            (fresh, torch.tensor(starts)), (at, torch.tensor(marks)[:, None]), (to, torch.tensor(targets)[:, None]),
        ):  # fmt: skip
            x.copy_(values)
        graph.replay()
        used = sum(lengths)
        pairs = [[(mark, target)] for mark, target in zip(marks, targets, strict=True)]
        expected = reference.prefill(*(x[:used] for x in new), lengths, owned, starts, pairs)
        assert relative_error(out[:used].cpu(), expected) <= budget(torch.bfloat16)
        assert relative_error(pool.dequantize().cpu(), reference.stacked()) <= budget(torch.bfloat16)
    with no_waiting():
        call()
        pool.dequantize(slots)


@pytest.mark.parametrize(
    "of",
    [
        Walk(S=9, R=16, state_dtype=INT8),
        Walk(S=9, H=16, Hk=4, D=128, E=128, R=16, state_dtype=INT8),
        Walk(S=9, H=16, Hk=4, D=64, E=96, R=7, rate="slow", state_dtype=INT8, dtype=BF16, ring_dtype=BF16),
        Walk(S=9, H=8, Hk=8, D=128, E=128, R=16, rate="none", state_dtype=INT8, dtype=BF16, ring_dtype=BF16),
        Walk(S=9, H=8, Hk=8, D=128, E=64, R=3, state_dtype=INT8, dtype=FP16, ring_dtype=FP16),
        Walk(S=9, H=8, Hk=8, D=128, E=128, R=16, state_dtype=INT8, dtype=BF16, ring_dtype=FP32),
        Walk(D=20, E=130, R=3, rate="no memory", state_dtype=INT8),
        Walk(D=128, E=128, R=1, state_dtype=INT8, dtype=BF16, ring_dtype=BF16),
    ],
    ids=lambda of: f"{of.rate}-{of.H}-{of.D}-{of.E}-{of.R}-{of.dtype}-{of.ring_dtype}",
)
def test_walks(of: Walk):
    """Steps, drafts and prompts, by the kernels for NVIDIA chips and by the others."""
    # A prompt's products are of numbers of 16 bits where its tokens are.
    states = STATES if of.dtype == FP32 else budget(of.dtype)
    walk(of, 150, device=DEVICE, tolerance=OUTPUTS, look_every=5, state_tolerance=states)


def _pool(N: int, H: int, D: int, E: int, rate: Tensor) -> tuple[QuantizedStates, RecentTokens, ReferencePool]:
    pool = QuantizedStates.empty(N, H, D, E, device=DEVICE)
    pool.quantize(torch.randn(N, H, D, E, device=DEVICE))
    return (
        pool,
        RecentTokens.empty(N, H, D, E, 16, BF16, DEVICE),
        ReferencePool(pool.dequantize().cpu(), rate.cpu(), 0.5),
    )


@pytest.mark.parametrize(
    ("N", "H", "D", "E"),
    [(3, 8, 128, 128), (44, 64, 128, 128), (44, 64, 64, 96), (70, 32, 64, 64), (130, 64, 64, 128)],
)
def test_a_captured_step_replayed(N: int, H: int, D: int, E: int):
    """Past two turns of the ring, by more programs than run at once: outputs, states, and which heads are written."""
    torch.manual_seed(0)
    rate = decay.alibi(H).to(DEVICE)
    pool, recent, reference = _pool(N + 2, H, D, E, rate)
    q, k, v = (torch.randn(N, H, width, device=DEVICE).to(BF16) for width in (D, D, E))
    slots = torch.full((N,), -1, device=DEVICE)

    def step() -> Tensor:
        return lightning_attention_decode(q, k, v, rate, pool, slots=slots, scale=0.5, recent=recent)

    step()  # compiled now; a batch of padding
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for n in range(2 * 16 + 5):
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape))
        rows = torch.randperm(N + 2)[:N]
        rows[n % N] = -1
        slots.copy_(rows)
        before = [x.clone() for x in tensors(pool)]
        graph.replay()
        expected = reference.decode(q.cpu(), k.cpu(), v.cpu(), rows.tolist())
        assert relative_error(out.cpu(), expected) <= OUTPUTS, n
        assert not out[n % N].any()
        for x, old in zip(tensors(pool), before, strict=True):
            written = (x != old).flatten(2).any(2).sum(1)
            assert written.max() <= -(-H // 16), n
            assert int(written.sum()) >= (N - 1) * (H // 16), n
    assert relative_error(whole(pool, recent, rate).cpu(), reference.stacked()) <= STATES


@pytest.mark.parametrize(("N", "H"), [(3, 8), (64, 64)], ids=["32 columns", "64"])
@pytest.mark.parametrize(
    ("dtype", "ring_dtype", "tolerance"),
    [(BF16, BF16, 4e-3), (FP16, FP16, 5e-4), (FP32, FP32, 3e-6), (BF16, FP32, 4e-3)],
)
def test_what_is_read_of_a_state(N: int, H: int, dtype: torch.dtype, ring_dtype: torch.dtype, tolerance: float):
    """What ``high`` says, by programs of both widths: keys of 0 read nothing else."""
    torch.manual_seed(0)
    D = E = 128
    pool = QuantizedStates.empty(N, H, D, E, device=DEVICE)
    pool.quantize(torch.randn(N, H, D, E, device=DEVICE) + 0.1)
    recent = RecentTokens.empty(N, H, D, E, 16, ring_dtype, DEVICE)
    k, v = torch.zeros(N, H, D, device=DEVICE, dtype=dtype), torch.randn(N, H, E, device=DEVICE).to(dtype)
    for _ in range(3):
        states = pool.high.double() * pool.scale.double()[..., None, :]  # heads that fold round theirs anew
        q = torch.randn(N, H, D, device=DEVICE).to(dtype)
        out = lightning_attention_decode(q, k, v, None, pool, scale=0.5, recent=recent)
        expected = torch.einsum("nhd,nhde->nhe", q.double() * 0.5, states)
        assert relative_error(out, expected) <= tolerance


def test_drafts_captured_and_replayed():
    """Verified and committed, more of them than a ring has places at times."""
    torch.manual_seed(0)
    N, H, D, T = 20, 32, 128, 120
    rate = decay.alibi(H).to(DEVICE)
    pool, recent, reference = _pool(N, H, D, D, rate)
    q, k, v = torch.zeros(3, T, H, D, device=DEVICE, dtype=BF16)
    cuts, slots = torch.zeros(N + 1, device=DEVICE, dtype=torch.int32), torch.full((N,), -1, device=DEVICE)
    accepted = torch.zeros(T, device=DEVICE, dtype=torch.bool)
    packed = {"cu_seqlens": cuts, "slots": slots, "recent": recent}

    def step() -> Tensor:
        found = lightning_attention_verify(q, k, v, rate, pool, scale=0.5, **packed)
        lightning_attention_commit(k, v, rate, pool, accepted=accepted, **packed)
        return found

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for n in range(12):
        lengths = [(n + i) % 5 for i in range(N - 1)] + [20]
        rows, used = torch.randperm(N), sum(lengths)
        rows[n] = -1
        new, taken = torch.randn(3, T, H, D).to(BF16), torch.rand(T) < 0.7
        for x, values in (
            (q, new[0]), (k, new[1]), (v, new[2]), (cuts, cumulative(lengths)), (slots, rows), (accepted, taken)
        ):  # fmt: skip
            x.copy_(values)
        graph.replay()
        expected = reference.verify(*(x[:used] for x in new), lengths, rows.tolist(), None)
        reference.commit(new[1][:used], new[2][:used], lengths, rows.tolist(), taken[:used].tolist())
        assert relative_error(out[:used].cpu(), expected) <= OUTPUTS, n
        assert not out[used:].any()
    assert relative_error(whole(pool, recent, rate).cpu(), reference.stacked()) <= STATES


def test_the_error_does_not_grow():
    """Over 2,000 tokens without decay, what outputs lose stays what ``high`` loses."""
    torch.manual_seed(0)
    N, H, D = 2, 16, 128
    pool, recent = QuantizedStates.empty(N, H, D, D, device=DEVICE), RecentTokens.empty(N, H, D, D, 16, BF16, DEVICE)
    state, errors = torch.zeros(N, H, D, D, device=DEVICE, dtype=torch.float64), []
    for _ in range(2000):
        q, k, v = torch.randn(3, N, H, D, device=DEVICE).to(BF16)
        out = lightning_attention_decode(q, k, v, None, pool, recent=recent)
        state += k.double()[..., None] * v.double()[..., None, :]
        errors.append(relative_error(out, torch.einsum("nhd,nhde->nhe", q.double(), state)))
    lightning_attention_fold(pool, recent, None)
    assert max(errors) <= 1e-2
    assert sum(errors[-200:]) <= 1.5 * sum(errors[200:400])
    assert relative_error(pool.dequantize(), state) <= STATES


@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [
        (FP32, 1e-30, 1e-5),
        (FP32, 1.0, 1e-5),
        (FP32, 1e30, 1e-5),
        (BF16, 1e-30, 4e-3),
        (BF16, 1e30, 4e-3),
        (FP16, 1e-4, 1e-3),
        (FP16, 1e4, 1e-3),
    ],
)
def test_queries_of_any_size(dtype: torch.dtype, size: float, tolerance: float):
    """They are read as whole numbers, counted in parts of the largest: also where that one meets nothing."""
    torch.manual_seed(0)
    N, H, D, E, other = 3, 8, 128, 128, 5
    rate = decay.alibi(H).to(DEVICE)
    states = torch.randn(N, H, D, E, device=DEVICE)
    states[:, :, other] = 0
    k, v = torch.randn(N, H, D, device=DEVICE).to(dtype), torch.randn(N, H, E, device=DEVICE).to(dtype)
    k[..., other] = 0
    for is_uneven in (False, True):
        pool = QuantizedStates.empty(N, H, D, E, device=DEVICE)
        recent = RecentTokens.empty(N, H, D, E, 16, dtype, DEVICE)
        pool.quantize(states)
        q = torch.randn(N, H, D, device=DEVICE)
        q[..., other] *= 100 if is_uneven else 1
        q = (q / 400 * size).to(dtype)
        out = lightning_attention_decode(q, k, v, rate, pool, scale=1 / size, recent=recent)
        high = pool.high.double() * pool.scale.double()[:, :, None]
        expected = torch.einsum("nhd,nhde->nhe", q.double(), high) * rate.double().exp()[:, None]
        expected += (q.double() * k.double()).sum(-1, keepdim=True) * v.double()
        assert relative_error(out, expected / size) <= (10 * tolerance if is_uneven else tolerance)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("what", [torch.inf, -torch.inf, torch.nan])
def test_a_query_that_is_not_finite(dtype: torch.dtype, what: float):
    """Nothing that its head reads is, and no other head reads anything else."""
    torch.manual_seed(0)
    N, H, D = 3, 8, 128
    rate, states = decay.alibi(H).to(DEVICE), torch.randn(N, H, D, D, device=DEVICE)
    tokens, outs = torch.randn(4, 3, N, H, D, device=DEVICE).to(dtype), []
    for is_spoilt in (False, True):
        pool = QuantizedStates.empty(N, H, D, D, device=DEVICE)
        recent = RecentTokens.empty(N, H, D, D, 16, dtype, DEVICE)
        pool.quantize(states)
        for q, k, v in tokens.clone():
            if is_spoilt:
                q[1, 2, 77] = what
            outs.append(lightning_attention_decode(q, k, v, rate, pool, recent=recent))
    clean, spoilt = torch.stack(outs).chunk(2)
    assert not spoilt[:, 1, 2].isfinite().any()
    spoilt[:, 1, 2] = clean[:, 1, 2]
    assert torch.equal(clean, spoilt)


def test_one_sequence_does_not_poison_another():
    """And what is not finite is NaN all over its columns, until the row is fresh."""
    torch.manual_seed(0)
    N, H, D, row = 4, 16, 128, 2
    start, rate = torch.randn(N, H, D, D, device=DEVICE), decay.alibi(H).to(DEVICE)
    others, tokens = torch.tensor([0, 1, 3], device=DEVICE), torch.randn(20, 3, N, H, D, device=DEVICE).to(BF16)
    cuts, results = torch.arange(N + 1, device=DEVICE), []
    for spoilt in (False, True):
        pool, recent, outs = QuantizedStates.empty(N, H, D, D, device=DEVICE), RecentTokens.empty(
            N, H, D, D, 16, BF16, DEVICE
        ), []  # fmt: skip
        pool.quantize(start)
        for n, x in enumerate(tokens):
            q, k, v = x.clone()
            if spoilt:
                k[row, :, 5], v[row, :, 7] = torch.inf, torch.nan
            packed = {"cu_seqlens": cuts, "recent": recent}
            if n % 5 == 4:
                outs.append(lightning_attention_verify(q, k, v, rate, pool, **packed)[others])
                accepted = torch.ones(N, dtype=torch.bool, device=DEVICE)
                lightning_attention_commit(k, v, rate, pool, accepted=accepted, **packed)
            else:
                outs.append(lightning_attention_decode(q, k, v, rate, pool, recent=recent)[others])
        assert bool(pool.dequantize()[row].isnan().any()) == spoilt
        q, k, v = tokens[0]
        outs.append(lightning_attention_prefill(q, k, v, rate, pool, fresh=cuts[:N] == row, **packed))
        outs.append(lightning_attention_decode(q, k, v, rate, pool, recent=recent))
        results.append([*outs, whole(pool, recent, rate)])
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)


def test_how_many_others_there_are_changes_no_bit():
    torch.manual_seed(0)
    most, H, D = 300, 8, 128
    start, rate = torch.randn(most, H, D, D, device=DEVICE), decay.alibi(H).to(DEVICE)
    tokens, alone = [torch.randn(3, most, H, D, device=DEVICE).to(BF16) for _ in range(20)], None
    for N in (1, 7, most):
        pool, recent = QuantizedStates.empty(most, H, D, D, device=DEVICE), RecentTokens.empty(
            most, H, D, D, 16, BF16, DEVICE
        )  # fmt: skip
        pool.quantize(start)
        slots, options = torch.arange(N, device=DEVICE), {"batch_invariant": True, "recent": recent}
        got = [
            lightning_attention_decode(q[:N], k[:N], v[:N], rate, pool, slots=slots, **options)[0] for q, k, v in tokens
        ]
        got += [x[0] for x in tensors(pool)]
        alone = alone or got
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True)), N


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_is_read_on_the_host():
    rate = decay.alibi(8).to(DEVICE)
    pool, recent, _ = _pool(3, 8, 128, 128, rate)
    q, k, v = torch.randn(3, 3, 8, 128, device=DEVICE).to(BF16)
    packed = {"cu_seqlens": torch.arange(4, device=DEVICE), "recent": recent}
    accepted = torch.ones(3, dtype=torch.bool, device=DEVICE)

    def call() -> None:
        lightning_attention_decode(q, k, v, rate, pool, recent=recent)
        lightning_attention_verify(q, k, v, rate, pool, **packed)
        lightning_attention_commit(k, v, rate, pool, accepted=accepted, **packed)
        lightning_attention_fold(pool, recent, rate)

    call()
    with no_waiting():
        call()
