"""Serving on the CPU's backends: float64 pools, decays of no memory, and NaN and inf staying where they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_attention import decay
from lightning_attention.kernels.backend import Backend
from lightning_attention.kernels.reference.backend import BACKEND as REFERENCE
from lightning_attention.kernels.tiled.backend import BACKEND as TILED
from tests.support import ReferencePool, budget, cumulative, relative_error

LENGTHS, SLOTS, H, D, E = [5, 70, 1, 3], [4, 0, -1, 2], 2, 8, 6
T = sum(LENGTHS)
PARENTS = torch.tensor([-1, 0, 0, 1, -1, *range(-1, 69), -1, -1, 0, 0])
ACCEPTED = [True, True, False, False, False, *([True] * 60 + [False] * 10), True, True, False, True]


class Calls:
    """Every operation on the same inputs, on fresh copies of a pool: outputs and the pool after it."""

    def __init__(self, backend: Backend, dtype: torch.dtype, rate: Tensor | None, Hk: int | None = None) -> None:
        torch.manual_seed(0)
        self.backend = backend
        self.q, self.k, self.v = (torch.randn(T + 3, H, n, dtype=dtype) for n in (D, D, E))
        self.q, self.k = self.q[:, :Hk], self.k[:, :Hk]
        self.pool, self.rate = torch.randn(7, H, D, E, dtype=dtype), rate
        self.cuts, self.slots = cumulative(LENGTHS), torch.tensor(SLOTS)
        self.out: Tensor | None = None

    def decode(self, pool: Tensor) -> Tensor | None:
        q, k, v = self.q[:4], self.k[:4], self.v[:4]
        return self.backend.decode(q, k, v, self.rate, pool, self.slots, 0.5, False, self.out)

    def prefill(self, pool: Tensor) -> Tensor | None:
        at, to = torch.tensor([[2, 5], [64, 1], [1, 0], [0, 9]]), torch.tensor([[1, -1], [3, 5], [6, -1], [6, -1]])
        return self.backend.prefill(
            self.q, self.k, self.v, self.rate, pool, self.cuts, self.slots, None, 0.5, at, to, False, self.out
        )

    def verify(self, pool: Tensor, parents: Tensor | None = None) -> Tensor | None:
        return self.backend.verify(
            self.q, self.k, self.v, self.rate, pool, self.cuts, self.slots, parents, 0.5, None, None, self.out
        )

    def verify_tree(self, pool: Tensor) -> Tensor | None:
        return self.verify(pool, torch.cat([PARENTS, PARENTS.new_zeros(3)]))

    def commit(self, pool: Tensor) -> Tensor:
        accepted = torch.tensor([*ACCEPTED, True, True, True])
        self.backend.commit(self.k, self.v, self.rate, pool, self.cuts, accepted, self.slots)
        return torch.zeros(0)

    def run(self, name: str) -> tuple[Tensor, Tensor]:
        pool = self.pool.clone()
        return getattr(self, name)(pool), pool

    def expected(self, name: str) -> tuple[Tensor, Tensor]:
        reference = ReferencePool(self.pool, self.rate, 0.5)
        q, k, v = (x[:T] for x in (self.q, self.k, self.v))
        shots = [[(2, 1)], [(64, 3), (1, 5)], [], [(0, 6)]]
        run: dict[str, Callable[[], Tensor | None]] = {
            "decode": lambda: reference.decode(q[:4], k[:4], v[:4], SLOTS),
            "prefill": lambda: reference.prefill(q, k, v, LENGTHS, SLOTS, None, shots),
            "verify": lambda: reference.verify(q, k, v, LENGTHS, SLOTS),
            "verify_tree": lambda: reference.verify(q, k, v, LENGTHS, SLOTS, PARENTS.tolist()),
            "commit": lambda: reference.commit(k, v, LENGTHS, SLOTS, ACCEPTED),
        }
        out = run[name]()
        return torch.zeros(0) if out is None else out, reference.stacked()


BACKENDS = pytest.mark.parametrize("backend", [TILED, REFERENCE], ids=lambda backend: backend.name)
NAMES = ["decode", "prefill", "verify", "verify_tree", "commit"]
RATES = {
    "none": None,
    "alibi": decay.alibi(H),
    "no memory": torch.tensor([-torch.inf, torch.finfo(torch.float32).min]),
    "one head without": torch.tensor([-torch.inf, -1e-3]),
}


@BACKENDS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_recurrence(dtype: torch.dtype, rate: str, name: str, backend: Backend):
    """float64 states are computed in float64; −inf and finfo.min are a decay of zero."""
    calls = Calls(backend, dtype, RATES[rate])
    (out, pool), (want_out, want_pool) = calls.run(name), calls.expected(name)
    assert out.dtype == dtype or name == "commit"
    used = out[: want_out.shape[0]]
    assert relative_error(used, want_out) <= budget(dtype)
    assert relative_error(pool, want_pool) <= budget(dtype)
    assert not out[want_out.shape[0] :].any()


@BACKENDS
@pytest.mark.parametrize("name", NAMES)
def test_one_head_of_q_and_k(name: str, backend: Backend):
    calls = Calls(backend, torch.float32, decay.alibi(H), Hk=1)
    (out, pool), (want_out, want_pool) = calls.run(name), calls.expected(name)
    assert relative_error(out[: want_out.shape[0]], want_out) <= budget(torch.float32)
    assert relative_error(pool, want_pool) <= budget(torch.float32)


@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v", "pool"])
@pytest.mark.parametrize("name", NAMES)
def test_one_sequence_does_not_poison_another(name: str, which: str, bad: float, backend: Backend):
    clean, spoilt = Calls(backend, torch.float32, decay.alibi(H)), Calls(backend, torch.float32, decay.alibi(H))
    tokens = slice(1, 2) if name == "decode" else slice(5, 75)  # those of the second sequence
    if which == "pool":
        spoilt.pool[SLOTS[1]] = bad
    else:
        getattr(spoilt, which)[tokens.start] = bad
    (want, want_pool), (got, pool) = clean.run(name), spoilt.run(name)
    for x in (want, got):
        x[tokens] = 0
    assert torch.equal(got, want)
    own = [SLOTS[1], *([3, 5] if name == "prefill" else [])]
    for x in (want_pool, pool):
        x[own] = 0
    assert torch.equal(pool, want_pool)


@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_bad_draft_spoils_only_what_follows_it(which: str, tree: bool, bad: float, backend: Backend):
    clean, spoilt = Calls(backend, torch.float32, decay.alibi(H)), Calls(backend, torch.float32, decay.alibi(H))
    getattr(spoilt, which)[1] = bad  # draft 1 of the first sequence; in the tree draft 3 is its child
    name = "verify_tree" if tree else "verify"
    (want, _), (got, _) = clean.run(name), spoilt.run(name)
    reached = [1, 3] if tree else [1, 2, 3, 4]
    assert not got[reached].isfinite().any()
    good = [t for t in range(T) if t not in reached]
    assert torch.equal(got[good], want[good])


@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rejected_drafts_and_snapshots_before_a_bad_token(bad: float, backend: Backend):
    clean, spoilt = Calls(backend, torch.float32, decay.alibi(H)), Calls(backend, torch.float32, decay.alibi(H))
    spoilt.v[2] = bad
    assert torch.equal(clean.run("commit")[1], spoilt.run("commit")[1])  # draft 2 is not accepted
    assert torch.equal(clean.run("prefill")[1][1], spoilt.run("prefill")[1][1])  # the state after two tokens


@BACKENDS
def test_a_chain_is_a_tree_to_the_bit(backend: Backend):
    calls = Calls(backend, torch.float32, decay.alibi(H))
    parents = torch.tensor([i - 1 for n in [*LENGTHS, 3] for i in range(n)])
    args = (calls.q, calls.k, calls.v, calls.rate, calls.pool, calls.cuts, calls.slots)
    assert torch.equal(backend.verify(*args, None, 1.0, None), backend.verify(*args, parents, 1.0, None))


@BACKENDS
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("parents", [None, torch.cat([PARENTS, PARENTS.new_zeros(3)])], ids=["chain", "tree"])
def test_the_state_after_each_draft(parents: Tensor | None, own: bool, backend: Backend):
    """In a pool of their own, or in the pool itself: there the first draft's takes the place of the sequence's."""
    calls = Calls(backend, torch.float64, decay.alibi(H))
    calls.pool = torch.randn(90, H, D, E, dtype=torch.float64)
    reference = ReferencePool(calls.pool, calls.rate, 0.5)
    want = reference.verify(
        calls.q[:T], calls.k[:T], calls.v[:T], LENGTHS, SLOTS, None if parents is None else parents[:T].tolist()
    )
    P = 60  # the second sequence has 70: ten of them are not kept
    rows = torch.full((4, P), -1)
    rows[0, :5] = torch.tensor([4, 80, -1, 81, 82])
    rows[1] = torch.arange(10, 70)
    rows[2, 0], rows[3, :5] = 83, torch.tensor([84, 85, 86, 87, 88])  # padding; and two drafts that are not there
    pool, kept = calls.pool.clone(), torch.full_like(calls.pool, torch.nan)
    kept = pool if own else kept
    before = kept.clone()
    out = backend.verify(
        calls.q, calls.k, calls.v, calls.rate, pool, calls.cuts, calls.slots, parents, 0.5, kept, rows, None
    )
    assert relative_error(out[:T], want) <= 1e-12
    expected = {}
    for n, start in enumerate(calls.cuts[:-1].tolist()):
        for i in range(min(P, LENGTHS[n])):
            after = reference.after_drafts[start + i]
            if after is not None and rows[n, i] >= 0:
                expected[int(rows[n, i])] = after
    assert len(expected) == 4 + 60 + 3
    for row in range(90):
        if row in expected:
            assert relative_error(kept[row], expected[row]) <= 1e-12
        else:
            assert torch.equal(kept[row].nan_to_num(), before[row].nan_to_num())
    assert own or torch.equal(pool, calls.pool)


@BACKENDS
@pytest.mark.parametrize("name", [name for name in NAMES if name != "commit"])
def test_into_out_without_padding(name: str, backend: Backend):
    calls = Calls(backend, torch.float32, decay.alibi(H))
    expected, want_pool = calls.run(name)
    calls.out = torch.full_like(expected, torch.nan)
    returned, pool = calls.run(name)
    assert returned is None
    padding = [2] if name == "decode" else [75, *range(T, T + 3)]  # of no slot, and past the last sequence
    used = [t for t in range(len(expected)) if t not in padding]
    assert torch.equal(calls.out[used], expected[used])
    assert calls.out[padding].isnan().all()
    assert torch.equal(pool, want_pool)
