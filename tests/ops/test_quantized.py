"""States in 8 bits, by the public functions on a CPU."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    QuantizedStates,
    RecentTokens,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_fold,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from lightning_attention.kernels.tiled.backend import BACKEND as TILED
from tests.support import ReferencePool, relative_error
from tests.support.rings import Walk, by_backend, tensors, walk, whole

BACKENDS = pytest.mark.parametrize("backend", ["tiled", "reference"])
INT8 = torch.int8


def quantized(states: Tensor) -> QuantizedStates:
    pool = QuantizedStates.empty(*states.shape)
    pool.quantize(states)
    return pool


@BACKENDS
def test_every_number_is_the_nearest(backend: str):
    torch.manual_seed(0)
    states = torch.randn(3, 2, 40, 7) * torch.logspace(-25, 25, 7)
    with by_backend(backend):
        pool = quantized(states)
        got = pool.dequantize()
    scale = pool.scale[:, :, None].double()
    assert (pool.high.abs().amax(2) == 127).all()
    assert torch.allclose(127 * scale[:, :, 0], states.abs().amax(2).double(), rtol=1e-6, atol=0)
    seen = pool.high * scale
    both = seen + pool.low * scale / 254
    assert ((states - seen).abs() <= scale * 0.5001).all()
    assert ((states - both).abs() <= scale / 254 * 0.502).all()
    assert relative_error(got, both) <= 1e-7
    # And once more changes nothing to speak of.
    pool.quantize(got)
    assert relative_error(pool.dequantize(), both) <= 2e-7


@BACKENDS
def test_zeros_and_the_smallest_and_largest_numbers(backend: str):
    columns = {
        "zeros": [0.0, 0.0, 0.0],
        "subnormal": [1e-40, -1e-45, 0.0],
        "too small": [1e-34, -1e-34, 0.0],
        "small": [1e-28, -3e-30, 0.0],
        "large": [3.4e38, -1e36, 1.0],
    }
    states = torch.tensor([*columns.values()]).T[None, None].contiguous()
    with by_backend(backend):
        pool = quantized(states)
        got = pool.dequantize()[0, 0]
    assert not got[:, :3].any()
    assert (pool.scale[..., :3] == 2.0**-100).all()
    for column in (3, 4):
        assert relative_error(got[:, column], states[0, 0, :, column]) <= 2e-5
    # A pool that nobody has written to is of zeros too.
    assert not QuantizedStates.empty(2, 1, 3, 4).dequantize().any()


@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_column_that_is_not_finite_reads_as_nan(bad: float, backend: str):
    """All of it, and no other, by steps too: a number that is lost is never a finite one."""
    states = torch.randn(2, 2, 5, 3)
    clean = quantized(states).dequantize()
    states[1, 0, 2, 1] = bad
    q, k, v = torch.randn(2, 2, 5), torch.randn(2, 2, 5), torch.randn(2, 2, 3)
    with by_backend(backend):
        pool, recent = quantized(states), RecentTokens.empty(2, 2, 5, 3, 4, torch.float32)
        got = pool.dequantize()
        outs = [lightning_attention_decode(q, k, v, None, pool, recent=recent) for _ in range(9)]
    assert got[1, 0, :, 1].isnan().all()
    assert not pool.scale[1, 0, 1].isfinite()
    got[1, 0, :, 1] = clean[1, 0, :, 1]
    assert torch.equal(got, clean)
    for out in outs:
        assert out[1, 0, 1].isnan()
        assert out.isnan().sum() == 1


@BACKENDS
def test_rows_and_padding(backend: str):
    torch.manual_seed(0)
    states, pool = torch.randn(3, 2, 5, 4), quantized(torch.randn(4, 2, 5, 4))
    pool.scale[1] = torch.nan  # a row that nobody owns
    before = [x.clone() for x in tensors(pool)]
    slots = torch.tensor([2, -1, 0])
    with by_backend(backend):
        pool.quantize(states, slots)
        got = pool.dequantize(slots)
    expected = quantized(states)
    assert torch.equal(got[[0, 2]], expected.dequantize()[[0, 2]])
    assert not got[1].any()
    for x, old, new in zip(tensors(pool), before, tensors(expected), strict=True):
        torch.testing.assert_close(x[[1, 3]], old[[1, 3]], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(x[[2, 0]], new[[0, 2]])


def test_rows_travel_to_another_pool():
    """As they are, between pools and to a server with half the heads; or as floats."""
    torch.manual_seed(0)
    of = Walk(S=3, H=4, Hk=4, R=4, state_dtype=INT8)
    pool, recent, log_decay = of.pool(torch.randn(3, 4, 8, 5)), of.rings(), of.log_decay()
    for _ in range(6):
        _decode(of, pool, recent, log_decay)
    expected = whole(pool, recent, log_decay)
    other, rings = QuantizedStates.empty(5, 4, 8, 5), replace(of, S=5).rings()
    for x, y in zip([*tensors(pool), *vars(recent).values()], [*tensors(other), *vars(rings).values()], strict=True):
        y[4] = x[1]
    assert torch.equal(whole(other, rings, log_decay)[4], expected[1])
    lightning_attention_fold(pool, recent, log_decay)
    half = QuantizedStates(*(x[:, 2:] for x in tensors(pool)))
    assert torch.equal(half.dequantize(), expected[:, 2:])
    # A prefix cache of floats.
    kept = pool.dequantize(torch.tensor([1]))
    other.quantize(kept, torch.tensor([0]))
    assert relative_error(other.dequantize()[0], expected[1]) <= 2e-7


def _decode(of: Walk, pool: QuantizedStates | Tensor, recent: RecentTokens, log_decay: Tensor | None) -> Tensor:
    q, k, v = torch.randn(of.S, of.Hk, of.D), torch.randn(of.S, of.Hk, of.D), torch.randn(of.S, of.H, of.E)
    return lightning_attention_decode(q, k, v, log_decay, pool, recent=recent)


RATES = torch.tensor([-0.5, -(2.0**-8), -1e-4, 0.0])  # ALiBi's fastest of 8 heads and its slowest, a slower one, none


def errors(steps: int, backend: str, D: int, rounded: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The error of each head's outputs, relative to float64, in each tenth of so many tokens: [10, H].

    ``rounded``: what is stored of a state, in place of QuantizedStates.
    """
    torch.manual_seed(0)
    H = len(RATES)
    zeros, recent = torch.zeros(1, H, D, D), RecentTokens.empty(1, H, D, D, dtype=torch.float32)
    pool = quantized(zeros) if rounded is None else zeros
    state, decay = torch.zeros(H, D, D, dtype=torch.float64), RATES.double().exp()[:, None, None]
    square = torch.zeros(2, steps, H, dtype=torch.float64)
    with by_backend(backend):
        for step in range(steps):
            q, k, v = torch.randn(3, 1, H, D)
            out = lightning_attention_decode(q, k, v, RATES, pool, recent=recent)[0]
            state = decay * state + k[0].double()[..., None] * v[0].double()[:, None]
            exact = torch.einsum("hd,hde->he", q[0].double(), state)
            square[0, step], square[1, step] = (out - exact).square().sum(1), exact.square().sum(1)
            if rounded is not None:  # what did not fold is as it was
                zeros.copy_(rounded(zeros))
    error, size = square.unflatten(1, (10, -1)).sum(2)
    return (error / size).sqrt()


def int8(states: Tensor) -> Tensor:
    """One plane of 8 bits."""
    scale = states.abs().amax(-2, keepdim=True).clamp(min=1e-30) / 127
    return (states / scale).round() * scale


def e4m3(states: Tensor) -> Tensor:
    scale = states.abs().amax(-2, keepdim=True).clamp(min=1e-30) / 448
    return (states / scale).to(torch.float8_e4m3fn).float() * scale


@BACKENDS
def test_the_error_does_not_grow(backend: str):
    found = errors(2000, backend, 16)
    assert found.max() <= 7e-3
    assert (found[-1] <= 1.5 * found[0]).all()


def test_with_one_plane_it_would_grow():
    found = errors(2000, "tiled", 16, int8)
    assert found[-1, -1] >= 3 * found[0, -1]


@pytest.mark.slow
def test_over_ten_thousand_tokens():
    """The numbers of docs/numerics.md; ``-s`` shows them, with ALL_FORMATS=1 in the environment those of others too."""
    stored = {"two planes": None}
    if os.environ.get("ALL_FORMATS"):
        stored |= {"int8": int8, "e4m3": e4m3, "bfloat16": lambda states: states.bfloat16().float()}
    found = {name: errors(10_000, "tiled", 64, rounded) for name, rounded in stored.items()}
    for name, tenths in found.items():
        print(name, *(" ".join(f"{x:.1e}" for x in tenth) for tenth in tenths[[0, 4, 9]]), sep="\n")
    planes = found["two planes"]
    assert planes.max() <= 6.5e-3
    assert (planes[-1] <= 1.5 * planes[0]).all()


def test_only_heads_that_fold_are_written():
    of = Walk(S=3, H=8, Hk=8, R=4, state_dtype=INT8)
    torch.manual_seed(0)
    pool, recent, log_decay = of.pool(torch.randn(3, 8, 8, 5)), of.rings(), of.log_decay()
    spread = torch.arange(8) * 4 // 8
    for step in range(1, 13):
        before = [x.clone() for x in tensors(pool)]
        _decode(of, pool, recent, log_decay)
        folds = (step + spread) % 4 == 0
        for x, old in zip(tensors(pool), before, strict=True):
            assert torch.equal(x[:, ~folds], old[:, ~folds])
            assert (x != old).flatten(2).any(2)[:, folds].all()
    before = [x.clone() for x in tensors(pool)]
    recent.count.zero_()
    lightning_attention_fold(pool, recent, log_decay)
    assert all(torch.equal(x, old) for x, old in zip(tensors(pool), before, strict=True))


@BACKENDS
@pytest.mark.parametrize(
    "of",
    [
        Walk(S=7, state_dtype=INT8),
        Walk(rate="none", state_dtype=INT8),
        Walk(rate="no memory", state_dtype=INT8),
        Walk(H=18, Hk=6, R=16, D=3, E=2, state_dtype=INT8),
        Walk(R=1, state_dtype=INT8),
    ],
    ids=lambda of: f"{of.rate}-{of.H}-{of.R}",
)
def test_walks(of: Walk, backend: str):
    """A server's day: outputs as exact as ``high``, states as both planes."""
    walk(of, 120, backend=backend, tolerance=1.5e-2, state_tolerance=3e-4)


@BACKENDS
def test_in_float64_and_in_bfloat16(backend: str):
    for dtype in (torch.float64, torch.bfloat16):
        of = Walk(dtype=dtype, ring_dtype=dtype, state_dtype=INT8)
        walk(of, 60, backend=backend, tolerance=1.5e-2, state_tolerance=3e-4)


@BACKENDS
def test_prefill_without_rings(backend: str):
    """With snapshots, fresh rows and padding; the rows that it does not write keep their bits."""
    torch.manual_seed(0)
    states = torch.randn(6, 2, 8, 5)
    states[3, 0, 0, 0] = torch.nan  # to be started afresh
    pool = quantized(states)
    reference = ReferencePool(states, None, 0.5)
    before = [x.clone() for x in tensors(pool)]
    lengths, slots, fresh = [3, 70, 1, 0], [0, 3, -1, 1], [False, True, False, False]
    at, to = [[2, 3], [64, 71], [1, 1], [0, -1]], [[4, -1], [5, 2], [-1, -1], [-1, -1]]
    q, k, v = torch.randn(74, 2, 8), torch.randn(74, 2, 8), torch.randn(74, 2, 5)
    with by_backend(backend):
        out = lightning_attention_prefill(
            q, k, v, None, pool, cu_seqlens=torch.tensor([0, 3, 73, 74, 74]), slots=torch.tensor(slots),
            fresh=torch.tensor(fresh), scale=0.5, snapshot_at=torch.tensor(at), snapshot_slots=torch.tensor(to),
        )  # fmt: skip
        got = pool.dequantize()
    pairs = [[*zip(a, b, strict=True)] for a, b in zip(at, to, strict=True)]
    expected = reference.prefill(q, k, v, lengths, slots, fresh, pairs)
    assert relative_error(out, expected) <= 2e-5
    assert relative_error(got, reference.stacked()) <= 2e-5
    for x, old in zip(tensors(pool), before, strict=True):
        assert torch.equal(x[2], old[2])


@BACKENDS
def test_one_sequence_does_not_poison_another(backend: str):
    of, row, results = Walk(S=4, state_dtype=INT8), 2, []
    for bad in (0.0, float("nan")):
        torch.manual_seed(0)
        pool, recent, log_decay, outs = of.pool(torch.randn(4, 4, 8, 5)), of.rings(), of.log_decay(), []
        with by_backend(backend):
            for step in range(12):
                q, k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 4, 5)
                if step > 2:
                    k[row] += bad
                outs.append(lightning_attention_decode(q, k, v, log_decay, pool, recent=recent))
                outs[-1][row] = 0
            packed = {"cu_seqlens": torch.arange(5), "recent": recent}
            fresh = torch.arange(4) == row
            outs.append(lightning_attention_prefill(q, torch.randn(4, 2, 8), v, log_decay, pool, fresh=fresh, **packed))
            outs.append(_decode(of, pool, recent, log_decay))
        results.append([*outs, whole(pool, recent, log_decay)])
    for clean, other in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, other)


def test_nothing_is_read_on_the_host():
    """By tensors that have no numbers."""
    S, N, H, D, E, T = 5, 3, 2, 8, 6, 7

    def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def index(*shape: int) -> Tensor:
        return of(*shape, dtype=torch.int64)

    q, v, rate = of(T, H, D), of(T, H, E), of(H)
    high, low, scale = of(S, H, D, E, dtype=INT8), of(S, H, D, E, dtype=INT8), of(S, H, E)
    ring = of(S, H, 4, D), of(S, H, 4, E), of(S, dtype=torch.int32), low, scale
    cuts, slots, fresh = index(N + 1), index(N), of(N, dtype=torch.bool)
    out = TILED.decode_recent(q[:N], q[:N], v[:N], rate, high, slots, 1.0, False, *ring)
    assert out is not None
    assert out.shape == (N, H, E)
    TILED.commit_recent(q, v, rate, high, cuts, of(T, dtype=torch.bool), slots, *ring)
    TILED.verify_recent(q, q, v, rate, high, cuts, slots, None, 1.0, *ring)
    TILED.fold(high, rate, slots, fresh, *ring)
    TILED.quantize(TILED.dequantize(high, low, scale, slots), high, low, scale, slots)


def _pool(**others: Any) -> QuantizedStates:
    return replace(QuantizedStates.empty(3, 2, 4, 6), **others)


PLANE = torch.zeros(3, 2, 4, 6, dtype=INT8)
WRONG = {
    "high's rank": (_pool(high=PLANE[0]), ValueError, r"state.high has shape \[2, 4, 6\]; it must be \[S, H, D, E\]"),
    "high's dtype": (_pool(high=PLANE.float()), TypeError, "state.high has dtype float32; it must be int8"),
    "low": (_pool(low=PLANE[:2]), ValueError, r"state.low has shape \[2, 2, 4, 6\]; it must be .* = \[3, 2, 4, 6\]"),
    "low's dtype": (_pool(low=PLANE.short()), TypeError, "state.low has dtype int16; it must be int8"),
    "low's device": (_pool(low=PLANE.to("meta")), ValueError, "state.low is on meta; it must be on cpu"),
    "no low": (_pool(low=None), TypeError, "state.low is a NoneType; it must be a tensor"),
    "scale": (
        _pool(scale=torch.zeros(3, 2, 4)), ValueError, r"state.scale has shape \[3, 2, 4\]; it must be \[S, H, E\]",
    ),
    "scale's dtype": (
        _pool(scale=torch.zeros(3, 2, 6).half()), TypeError, "state.scale has dtype float16; it must be float32",
    ),
    "scale's gradient": (_pool(scale=torch.zeros(3, 2, 6).requires_grad_()), ValueError, "state.scale requires grad"),
    "strides": (
        _pool(low=torch.zeros(3, 2, 6, 4, dtype=INT8).mT), ValueError, "state.low has strides .* must be contiguous",
    ),
    "other strides": (
        _pool(low=torch.zeros(3, 4, 4, 6, dtype=INT8)[:, ::2]), ValueError, "state.low has strides .* state.high's",
    ),
    "one place for all": (
        _pool(scale=torch.zeros(1, 1, 6).expand(3, 2, 6)), ValueError, "state.scale has strides",
    ),
}  # fmt: skip


def _calls(pool: QuantizedStates | Tensor, recent: RecentTokens | None) -> dict[str, Callable[[], object]]:
    q, k, v = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(3, 2, 6)
    packed = {"cu_seqlens": torch.arange(4), "recent": recent}
    accepted = torch.ones(3, dtype=torch.bool)
    return {
        "decode": lambda: lightning_attention_decode(q, k, v, None, pool, recent=recent),
        "prefill": lambda: lightning_attention_prefill(q, k, v, None, pool, **packed),
        "verify": lambda: lightning_attention_verify(q, k, v, None, pool, **packed),
        "commit": lambda: lightning_attention_commit(k, v, None, pool, accepted=accepted, **packed),
        "fold": lambda: lightning_attention_fold(pool, recent, None),
    }


OPERATIONS = ["decode", "prefill", "verify", "commit", "fold"]


@pytest.mark.parametrize("operation", [*OPERATIONS, "quantize", "dequantize"])
@pytest.mark.parametrize("wrong", WRONG)
def test_errors(wrong: str, operation: str):
    pool, error, message = WRONG[wrong]
    calls = _calls(pool, RecentTokens.empty(3, 2, 4, 6, dtype=torch.float32))
    calls |= {"quantize": lambda: pool.quantize(torch.zeros(3, 2, 4, 6)), "dequantize": pool.dequantize}
    with pytest.raises(error, match=message):
        calls[operation]()


@pytest.mark.parametrize("operation", ["decode", "verify", "commit", "fold"])
def test_without_rings_there_is_no_step(operation: str):
    with pytest.raises(ValueError, match="recent is None; with QuantizedStates it must be RecentTokens: only prefill"):
        _calls(_pool(), None)[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_plane_alone_is_no_state(operation: str):
    with pytest.raises(TypeError, match="state has dtype int8; it must be float32 or bfloat16 or float16"):
        _calls(PLANE, RecentTokens.empty(3, 2, 4, 6, dtype=torch.float32))[operation]()


def test_a_pool_of_other_sizes():
    with pytest.raises(ValueError, match=r"state.high has shape \[3, 2, 5, 6\]; it must be \[S, H, D, E\] = \[S, 2, 4"):
        _calls(QuantizedStates.empty(3, 2, 5, 6), None)["decode"]()


def test_errors_of_rows():
    pool = _pool()
    with pytest.raises(ValueError, match=r"states has shape \[2, 2, 4, 6\]; it must be .* = \[3, 2, 4, 6\]"):
        pool.quantize(torch.zeros(2, 2, 4, 6))
    with pytest.raises(TypeError, match="states has dtype bfloat16; it must be float32"):
        pool.quantize(torch.zeros(3, 2, 4, 6, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="states is on meta; it must be on cpu"):
        pool.quantize(torch.zeros(3, 2, 4, 6, device="meta"))
    with pytest.raises(ValueError, match="states requires grad"):
        pool.quantize(torch.zeros(3, 2, 4, 6, requires_grad=True))
    with pytest.raises(ValueError, match="slots holds 3; state has 3 rows"):
        pool.dequantize(torch.tensor([3]))
    with pytest.raises(ValueError, match="a slot must not be given twice"):
        pool.quantize(torch.zeros(2, 2, 4, 6), torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="slots has dtype float32"):
        pool.dequantize(torch.zeros(1))


@pytest.mark.parametrize("recent", [None, RecentTokens.empty(3, 2, 4, 6, dtype=torch.float32)], ids=["no", "rings"])
def test_snapshots_of_drafts_do_not_go_with_it(recent: RecentTokens | None):
    q, v = torch.zeros(1, 2, 4), torch.zeros(1, 2, 6)
    after = {"snapshots": torch.zeros(1, 2, 4, 6), "snapshot_slots": torch.tensor([[0], [-1], [-1]])}
    with pytest.raises(ValueError, match="snapshots are asked for and state is QuantizedStates"):
        lightning_attention_verify(
            q, q, v, None, _pool(), cu_seqlens=torch.tensor([0, 1, 1, 1]), recent=recent, **after
        )
