"""Rings of recent tokens, by the public functions on a CPU."""

from dataclasses import replace
from typing import Any

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
from tests.support import ReferencePool, relative_error
from tests.support.rings import Walk, by_backend, copied, walk, whole

BACKENDS = pytest.mark.parametrize("backend", ["tiled", "reference"])


def test_a_thousand_operations():
    walk(Walk(S=9), 1000)


@BACKENDS
@pytest.mark.parametrize(
    "of",
    [
        Walk(rate="none"),
        Walk(rate="no memory"),
        Walk(rate="slow", H=1, Hk=1, R=3),
        Walk(H=18, Hk=6, R=16, D=3, E=2),
        Walk(R=1),
        Walk(H=3, Hk=3, R=64, operations=("decode", "decode", "decode", "decode", "verify", "commit")),
    ],
    ids=lambda of: f"{of.rate}-{of.H}-{of.R}",
)
def test_walks(of: Walk, backend: str):
    walk(of, 150, backend=backend)


@BACKENDS
def test_in_float64(backend: str):
    dtypes = {"dtype": torch.float64, "ring_dtype": torch.float64, "state_dtype": torch.float64}
    walk(Walk(**dtypes), 100, backend=backend, tolerance=1e-13)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_ring_of_the_tokens_dtype_is_exact(dtype: torch.dtype, backend: str):
    """And one of float32 no better: states are as exact, and outputs are rounded once."""
    recent, tokens = Walk(dtype=dtype, ring_dtype=dtype), 2 * torch.finfo(dtype).eps
    walk(replace(recent, operations=("decode", "commit", "fold")), 60, backend=backend, tolerance=tokens)
    states = []
    for ring_dtype in (dtype, torch.float32):
        pool, rings, log_decay = _decoded(replace(recent, ring_dtype=ring_dtype), 40)
        states.append(whole(pool, rings, log_decay))
    assert torch.equal(*states)


def _tokens(of: Walk, N: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    q, k, v = torch.randn(N, of.Hk, of.D), torch.randn(N, of.Hk, of.D), torch.randn(N, of.H, of.E)
    return q.to(of.dtype), k.to(of.dtype), v.to(of.dtype)


def _decoded(of: Walk, steps: int) -> tuple[Tensor, RecentTokens, Tensor | None]:
    """A pool after so many tokens of all of its rows."""
    torch.manual_seed(0)
    pool, recent, log_decay = torch.randn(of.S, of.H, of.D, of.E).to(of.state_dtype), of.rings(), of.log_decay()
    for step in range(steps):
        lightning_attention_decode(*_tokens(of, of.S, step), log_decay, pool, recent=recent)
    return pool, recent, log_decay


@pytest.mark.parametrize(("H", "R"), [(32, 16), (20, 16), (3, 16), (1, 4)])
def test_every_step_writes_as_many_states(H: int, R: int):
    """Those of 1/R of the heads, rounded up or down, from the first step on, though all slots began together."""
    of = Walk(S=3, H=H, Hk=H, R=R, D=2, E=2)
    pool, recent, log_decay = of_start = _decoded(of, 0)
    assert not of_start[1].count.any()
    written = []
    for step in range(2 * R):
        before = pool.clone()
        lightning_attention_decode(*_tokens(of, of.S, step), log_decay, pool, recent=recent)
        written.append((pool != before).flatten(2).any(2).sum(1))
    counts = torch.stack(written)  # [steps, S]
    assert counts.min() >= H // R
    assert counts.max() <= -(-H // R)
    assert (counts[:R].sum(0) == H).all()


@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_sequence_does_not_poison_another(which: int, bad: float, backend: str):
    """Nor does what was in a ring before it was emptied."""
    of, row = Walk(S=4), 2
    results = []
    for spoilt in (False, True):
        with by_backend(backend):
            pool, recent, log_decay = _decoded(of, 3)
            outs = []
            for step in range(3, 12):
                tokens = _tokens(of, of.S, step)
                if spoilt:
                    tokens[which][row] = bad
                outs.append(lightning_attention_decode(*tokens, log_decay, pool, recent=recent))
            fresh = torch.arange(of.S) == row
            cuts = torch.arange(of.S + 1)
            tokens = _tokens(of, of.S, 99)
            lightning_attention_prefill(*tokens, log_decay, pool, cu_seqlens=cuts, fresh=fresh, recent=recent)
            last = lightning_attention_decode(*_tokens(of, of.S, 100), log_decay, pool, recent=recent)
        for out in outs:
            assert spoilt or out.isfinite().all()
            out[row] = 0
        results.append([*outs, last, whole(pool, recent, log_decay)])
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)


def test_a_row_may_be_copied_to_any_slot():
    """State, keys, values and count, in the middle of a ring."""
    of = Walk(S=6, R=4)
    pool, recent, log_decay = _decoded(of, 7)
    tokens, slots = _tokens(of, 1, 50), torch.tensor([1])
    pool_after, recent_after = pool.clone(), copied(recent)
    expected = lightning_attention_decode(*tokens, log_decay, pool_after, slots=slots, recent=recent_after)
    for x in (pool, recent.k, recent.v, recent.count):
        x[4] = x[1]
    out = lightning_attention_decode(*tokens, log_decay, pool, slots=slots + 3, recent=recent)
    assert torch.equal(out, expected)
    assert torch.equal(whole(pool, recent, log_decay)[4], whole(pool_after, recent_after, log_decay)[1])


def test_a_bfloat16_state_is_rounded_less_often():
    """Once in R tokens: it is nearer to float64 than one that every step rounds."""
    of = Walk(S=2, H=16, Hk=16, D=16, E=16, R=16, dtype=torch.bfloat16, ring_dtype=torch.bfloat16,
              state_dtype=torch.bfloat16, rate="slow")  # fmt: skip
    pool, recent, log_decay = _decoded(of, 200)
    torch.manual_seed(0)
    plain = torch.randn(of.S, of.H, of.D, of.E).to(of.state_dtype)
    reference = ReferencePool(plain.clone(), log_decay)
    for step in range(200):
        q, k, v = _tokens(of, of.S, step)
        lightning_attention_decode(q, k, v, log_decay, plain)
        reference.decode(q, k, v, range(of.S))
    with_rings = relative_error(whole(pool, recent, log_decay), reference.stacked())
    assert with_rings <= 0.5 * relative_error(plain, reference.stacked())


@pytest.mark.parametrize("slots", [None, [2, -1]])
def test_fold_leaves_other_rows_alone(slots: list[int] | None):
    pool, recent, log_decay = _decoded(Walk(), 8)
    expected, before, rings = whole(pool, recent, log_decay), pool.clone(), copied(recent)
    given = None if slots is None else torch.tensor(slots)
    lightning_attention_fold(pool, recent, log_decay, slots=given)
    rows = range(len(pool)) if slots is None else [2]
    for slot in range(len(pool)):
        assert torch.equal(pool[slot], expected[slot] if slot in rows else before[slot])
        assert recent.count[slot] == (0 if slot in rows else rings.count[slot])
    # And once more changes nothing.
    lightning_attention_fold(pool, recent, log_decay)
    after = pool.clone()
    lightning_attention_fold(pool, recent, log_decay)
    assert torch.equal(pool, after)


def test_a_pool_without_rows_serves_padding():
    of = Walk(S=0)
    pool, recent, slots = torch.zeros(0, of.H, of.D, of.E), of.rings(), torch.tensor([-1, -2])
    out = lightning_attention_decode(*_tokens(of, 2, 0), of.log_decay(), pool, slots=slots, recent=recent)
    assert not out.any()
    lightning_attention_fold(pool, recent, None)


def _ring_of(**others: Any) -> RecentTokens:
    sizes: dict[str, Any] = {"slots": 3, "num_heads": 2, "D": 4, "E": 6, "length": 5, "dtype": torch.float32} | others
    return RecentTokens.empty(**sizes)


WRONG = {
    "no RecentTokens": ((1, 2, 3), TypeError, "recent is a tuple; it must be RecentTokens"),
    "slots": (_ring_of(slots=4), ValueError, r"recent.k has shape \[4, 2, 5, 4\]; it must be \[S, H, R, D\]"),
    "heads": (_ring_of(num_heads=1), ValueError, r"recent.k has shape \[3, 1, 5, 4\]; it must be .* = \[3, 2, 5, 4\]"),
    "D": (_ring_of(D=5), ValueError, r"recent.k has shape \[3, 2, 5, 5\]; it must be"),
    "E": (_ring_of(E=5), ValueError, r"recent.v has shape \[3, 2, 5, 5\]; it must be \[S, H, R, E\]"),
    "dtype": (
        _ring_of(dtype=torch.bfloat16), TypeError,
        r"recent.k has dtype bfloat16; it must be that of k, float32: .* dtype=torch.float32\)$",
    ),
    "device": (_ring_of(device="meta"), ValueError, "recent.k is on meta; it must be on cpu"),
    "two dtypes": (
        replace(_ring_of(), v=torch.zeros(3, 2, 5, 6, dtype=torch.float16)), TypeError,
        "recent.v has dtype float16; it must be float32",
    ),
    "two lengths": (
        replace(_ring_of(), v=torch.zeros(3, 2, 4, 6)), ValueError, r"recent.v has shape \[3, 2, 4, 6\]; it must be",
    ),
    "rank": (
        replace(_ring_of(), k=torch.zeros(3, 2, 4)), ValueError,
        r"recent.k has shape \[3, 2, 4\]; it must be .* \[3, 2, R, 4\], R from 1 to 64",
    ),
    "too long": (
        replace(_ring_of(), k=torch.zeros(3, 2, 65, 4)), ValueError, r"recent.k has shape .*, R from 1 to 64$",
    ),
    "count's shape": (
        replace(_ring_of(), count=torch.zeros(2, dtype=torch.int32)), ValueError,
        r"recent.count has shape \[2\]; it must be \[S\] = \[3\]",
    ),
    "count's dtype": (
        replace(_ring_of(), count=torch.zeros(3, dtype=torch.int64)), TypeError,
        "recent.count has dtype int64; it must be int32",
    ),
    "strides": (
        replace(_ring_of(), k=torch.zeros(3, 2, 4, 5).mT), ValueError, r"recent.k has strides .* must be contiguous",
    ),
    "one place for all": (
        replace(_ring_of(), v=torch.zeros(1, 1, 5, 6).expand(3, 2, 5, 6)), ValueError, r"recent.v has strides",
    ),
    "count's strides": (
        replace(_ring_of(), count=torch.zeros(6, dtype=torch.int32)[::2]), ValueError,
        "recent.count has strides .*; it must be contiguous",
    ),
    "a gradient": (replace(_ring_of(), k=torch.zeros(3, 2, 5, 4).requires_grad_()), ValueError, "recent.k requires"),
}  # fmt: skip


@pytest.mark.parametrize("operation", ["decode", "prefill", "verify", "commit", "fold"])
@pytest.mark.parametrize("wrong", WRONG)
def test_errors(wrong: str, operation: str):
    recent, error, message = WRONG[wrong]
    if operation == "fold" and wrong == "dtype":
        return  # it has no tokens that the ring might not hold
    q, k, v, pool = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(3, 2, 6), torch.zeros(3, 2, 4, 6)
    packed = {"cu_seqlens": torch.arange(4), "recent": recent}
    calls = {
        "decode": lambda: lightning_attention_decode(q, k, v, None, pool, recent=recent),
        "prefill": lambda: lightning_attention_prefill(q, k, v, None, pool, **packed),
        "verify": lambda: lightning_attention_verify(q, k, v, None, pool, **packed),
        "commit": lambda: lightning_attention_commit(
            k, v, None, pool, accepted=torch.ones(3, dtype=torch.bool), **packed
        ),
        "fold": lambda: lightning_attention_fold(pool, recent, None),
    }
    with pytest.raises(error, match=message):
        calls[operation]()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_ring_for_tokens_of_16_bits_has_their_dtype_or_float32(dtype: torch.dtype):
    q, v = torch.zeros(3, 2, 4, dtype=dtype), torch.zeros(3, 2, 6, dtype=dtype)
    (other,) = {torch.bfloat16, torch.float16} - {dtype}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=rf"that of k, {name} or float32: .* dtype=torch.{name}\)$"):
        lightning_attention_decode(q, q, v, None, torch.zeros(3, 2, 4, 6), recent=_ring_of(dtype=other))


@pytest.mark.parametrize(
    ("length", "error"), [(0, ValueError), (65, ValueError), (1.5, TypeError), ("16", TypeError), (True, TypeError)]
)
def test_lengths_that_are_none(length: Any, error: type[Exception]):
    with pytest.raises(error, match=r"^length is "):
        _ring_of(length=length)


def test_errors_of_fold():
    recent, pool = _ring_of(), torch.zeros(3, 2, 4, 6)
    with pytest.raises(ValueError, match=r"state has shape \[3, 2, 4\]; it must be \[S, H, D, E\]"):
        lightning_attention_fold(pool[..., 0], recent, None)
    with pytest.raises(TypeError, match="state has dtype int32"):
        lightning_attention_fold(pool.int(), recent, None)
    with pytest.raises(ValueError, match=r"log_decay has shape \[3\]"):
        lightning_attention_fold(pool, recent, decay.alibi(3))
    with pytest.raises(ValueError, match="must be at most 0"):
        lightning_attention_fold(pool, recent, torch.ones(2))
    with pytest.raises(ValueError, match="a slot must not be given twice"):
        lightning_attention_fold(pool, recent, None, slots=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="slots holds 3; state has 3 rows"):
        lightning_attention_fold(pool, recent, None, slots=torch.tensor([3]))
    with pytest.raises(TypeError, match="slots has dtype float32"):
        lightning_attention_fold(pool, recent, None, slots=torch.zeros(1))
    with pytest.raises(ValueError, match="state requires grad"):
        lightning_attention_fold(pool.requires_grad_(), recent, None)


def test_snapshots_of_drafts_do_not_go_with_rings():
    recent, pool = _ring_of(), torch.zeros(3, 2, 4, 6)
    q, v, cuts = torch.zeros(1, 2, 4), torch.zeros(1, 2, 6), torch.tensor([0, 1, 1, 1])
    after = {"snapshots": torch.zeros(1, 2, 4, 6), "snapshot_slots": torch.tensor([[0], [-1], [-1]])}
    with pytest.raises(ValueError, match="snapshots and recent are both given"):
        lightning_attention_verify(q, q, v, None, pool, cu_seqlens=cuts, recent=recent, **after)
