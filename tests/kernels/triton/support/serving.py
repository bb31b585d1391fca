"""Calls on a pool of states: made, run with the kernels, and held to a dictionary of float64 states."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_attention import (
    decay,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_verify,
)
from tests.support import ReferencePool, budget, cumulative, relative_error

NAN = float("nan")
S = 7  # rows of a pool

# Each draft's parent within its sequence: depth 4 and two branches; level by level; three roots; one draft.
TREES = {
    "branches": [-1, 0, 1, 2, 1, 4, 5, -1],
    "level by level": [-1, 0, 0, 1, 2, 3, 4, 5],
    "several roots": [-1, -1, 0, 2, -1, 1, 3],
    "one draft": [-1],
}


@dataclass(frozen=True)
class Call:
    """Arguments of any of the operations, the tokens packed; what nobody owns is NaN.

    ``layout`` of the state: "rows"; "layer", one of several in each row of a larger pool; "columns first"; "unaligned".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    pool: Tensor
    lengths: list[int]
    slots: list[int]
    parents: list[int] | None = None
    accepted: list[bool] | None = None
    scale: float = 1.0
    layout: str = "rows"
    index_dtype: torch.dtype = torch.int64

    def indices(self, x: Sequence[int] | None) -> Tensor | None:
        return None if x is None else torch.tensor(x, dtype=self.index_dtype, device=self.q.device)

    def state(self) -> Tensor:
        """A new copy of the pool, laid out as ``layout`` says."""
        _, H, D, E = self.pool.shape
        if self.layout == "layer":
            state = self.pool.new_full((len(self.pool), 3, H, D, E), NAN)[:, 1]
        elif self.layout == "columns first":
            state = self.pool.new_empty(len(self.pool), H, E, D).transpose(2, 3)
        elif self.layout == "unaligned":
            state = self.pool.new_empty(self.pool.numel() + 1)[1:].view_as(self.pool)
        else:
            return self.pool.clone()
        return state.copy_(self.pool)


Arguments = TypeVar("Arguments")


def moved(call: Arguments, device: str) -> Arguments:
    """A dataclass with its tensors on the device."""
    return replace(
        call, **{f.name: x.to(device) for f in fields(call) if isinstance(x := getattr(call, f.name), Tensor)}
    )


def make_call(
    lengths: list[int],
    slots: list[int] | None = None,
    *,
    H: int = 2,
    Hk: int | None = None,
    D: int = 16,
    E: int = 16,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    kind: str = "alibi",
    padding: int = 0,
    seed: int = 0,
    **others: Any,
) -> Call:
    """Views of one projection; ``padding`` tokens past the last sequence. Without slots row i is sequence i's."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    projection = torch.randn(T + padding, H, 2 * D + E, generator=generator).to(dtype)
    pool = torch.randn(S if slots is not None else len(lengths), H, D, E, generator=generator).to(state_dtype)
    owners = range(len(lengths)) if slots is None else slots
    projection[T:] = NAN
    for i, slot in enumerate(owners):
        if slot < 0:
            projection[sum(lengths[:i]) : sum(lengths[: i + 1])] = NAN
    pool[sorted(set(range(len(pool))) - set(owners))] = NAN
    log_decay = {"none": None, "alibi": decay.alibi(H), "strong": torch.full((H,), -8.0)}[kind]
    q, k, v = projection.split([D, D, E], 2)
    return Call(q[:, :Hk], k[:, :Hk], v, log_decay, pool, list(lengths), list(owners), **others)


def arguments(operation: str, call: Call, state: Tensor, without_slots: bool = False) -> tuple[Any, ...]:
    """As the kernels take them."""
    slots = None if without_slots else call.indices(call.slots)
    cu_seqlens = call.indices(cumulative(call.lengths).tolist())
    if operation == "decode":
        return call.q, call.k, call.v, call.log_decay, state, slots, call.scale, False
    if operation == "verify":
        parents = call.parents
        if parents is not None:
            parents = parents + [10**6] * (len(call.q) - len(parents))
        return call.q, call.k, call.v, call.log_decay, state, cu_seqlens, slots, call.indices(parents), call.scale
    assert call.accepted is not None
    accepted = torch.tensor(call.accepted + [True] * (len(call.k) - len(call.accepted)), device=call.q.device)
    return call.k, call.v, call.log_decay, state, cu_seqlens, accepted, slots


def with_kernels(operation: str, call: Call, without_slots: bool = False) -> tuple[Tensor | None, Tensor]:
    """Outputs and pool."""
    from lightning_attention.kernels.triton import decode, speculative

    module = decode if operation == "decode" else speculative
    state = call.state()
    return getattr(module, operation)(*arguments(operation, call, state, without_slots)), state


def into_out(operation: str, call: Call) -> tuple[Tensor | None, Tensor, Tensor]:
    """What is returned, what is in ``out``, which was full of NaN, and the pool."""
    from lightning_attention.kernels.triton import decode, speculative

    module = decode if operation == "decode" else speculative
    state, out = call.state(), torch.full_like(call.v, NAN, memory_format=torch.contiguous_format)
    absent = (None, None) if operation == "verify" else ()  # states after drafts
    return getattr(module, operation)(*arguments(operation, call, state), *absent, out), out, state


def assert_all_but_padding(call: Any, out: Tensor, expected: Tensor) -> None:
    """``out`` has the bits of ``expected``, and NaN at padding."""
    owner = [slot for slot, length in zip(call.slots, call.lengths, strict=True) for _ in range(length)]
    used = [t for t in range(len(out)) if t < len(owner) and owner[t] >= 0]
    rest = sorted(set(range(len(out))) - set(used))
    assert rest
    assert torch.equal(out[used], expected[used])
    assert out[rest].isnan().all()


def with_operations(operation: str, call: Call) -> tuple[Tensor | None, Tensor]:
    """Outputs and pool, by the public functions."""
    state = call.state()
    return apply(operation, arguments(operation, call, state)), state


def apply(operation: str, given: tuple[Any, ...]) -> Tensor | None:
    """The public function, on what ``arguments`` returns."""
    if operation == "decode":
        q, k, v, log_decay, state, slots, scale, batch_invariant = given
        return lightning_attention_decode(
            q, k, v, log_decay, state, slots=slots, scale=scale, batch_invariant=batch_invariant
        )
    if operation == "verify":
        q, k, v, log_decay, state, cu_seqlens, slots, parents, scale = given
        return lightning_attention_verify(
            q, k, v, log_decay, state, cu_seqlens=cu_seqlens, slots=slots, parents=parents, scale=scale
        )
    k, v, log_decay, state, cu_seqlens, accepted, slots = given
    lightning_attention_commit(k, v, log_decay, state, cu_seqlens=cu_seqlens, accepted=accepted, slots=slots)
    return None


def bits(x: Tensor) -> Tensor:
    """To compare what may be NaN."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_right(operation: str, call: Call, out: Tensor | None, state: Tensor) -> None:
    """Outputs and states within the budget of their dtypes; padding zero, and what nobody owns as it was."""
    call, state = moved(call, "cpu"), state.cpu()
    reference = ReferencePool(call.pool, call.log_decay, call.scale)
    changed = {slot for slot, length in zip(call.slots, call.lengths, strict=True) if slot >= 0 and length}
    if operation == "commit":
        assert out is None
        assert call.accepted is not None
        reference.commit(call.k, call.v, call.lengths, call.slots, call.accepted)
        parts = torch.tensor(call.accepted).split(call.lengths)
        changed = {slot for slot, part in zip(call.slots, parts, strict=True) if slot >= 0 and bool(part.any())}
    else:
        assert out is not None
        assert out.dtype == call.v.dtype
        assert out.is_contiguous()
        if operation == "decode":
            expected = reference.decode(call.q, call.k, call.v, call.slots)
        else:
            expected = reference.verify(call.q, call.k, call.v, call.lengths, call.slots, call.parents)
            changed = set()
        assert relative_error(out.cpu(), expected) <= 2 * budget(call.v.dtype)
        owner = [slot for slot, length in zip(call.slots, call.lengths, strict=True) for _ in range(length)]
        for t in range(len(out)):
            if t >= len(owner) or owner[t] < 0:
                assert not out[t].any(), t
    for slot in range(len(state)):
        if slot in changed:
            assert relative_error(state[slot], reference.states[slot]) <= budget(state.dtype), slot
            assert not torch.equal(state[slot], call.pool[slot]), slot
        else:
            assert torch.equal(bits(state[slot]), bits(call.pool[slot])), slot


DECODED: dict[str, dict[str, Any]] = {
    "identity": {"slots": [0, 1, 2, 3, 4, 5, 6]},
    "permuted": {"slots": [3, 0, 5, 1, 2, 4, 6], "H": 1, "D": 48, "E": 80, "index_dtype": torch.int32},
    "reversed": {"slots": [6, 5, 4, 3, 2, 1, 0], "H": 3, "scale": 0.125},
    "padding, and the last row": {"slots": [-1, 2, -7, 6], "D": 128, "E": 20, "index_dtype": torch.int32},
    "all padding": {"slots": [-1, -1]},
    "odd widths": {"slots": [4, 1], "D": 5, "E": 3},
    "fewer heads of q and k": {"slots": [4, -1, 1], "H": 6, "Hk": 2, "D": 20},
    "many columns": {"slots": [4, -1, 1], "D": 20, "E": 300},
    "half precision": {"slots": [4, -1, 1], "D": 80, "E": 48, "dtype": torch.float16},
    "a float16 pool": {"slots": [6, -1, 1], "D": 20, "E": 36, "state_dtype": torch.float16},
    "a layer of a larger pool": {"slots": [6, 1], "layout": "layer", "D": 20, "E": 36},
    "columns first": {"slots": [6, 1], "layout": "columns first", "D": 20, "E": 36},
    "unaligned": {"slots": [6, 1], "layout": "unaligned"},
    "no decay": {"slots": [2], "kind": "none"},
    "forgotten at once": {"slots": [2, 5], "kind": "strong"},
}

VERIFIED: dict[str, dict[str, Any]] = {
    "chains": {"lengths": [5, 0, 1, 3], "slots": [6, 1, -1, 0], "padding": 6, "D": 48, "E": 80},
    "a tree level by level": {
        "lengths": [8, 0, 8], "slots": [4, 0, -1], "parents": TREES["level by level"] * 2, "padding": 2,
        "index_dtype": torch.int32, "scale": -2.0,
    },
    "trees": {
        "lengths": [8, 7, 1], "slots": [6, 0, 2],
        "parents": TREES["branches"] + TREES["several roots"] + TREES["one draft"], "D": 20, "E": 36,
    },
    "fewer heads of q and k": {
        "lengths": [8], "slots": [3], "parents": TREES["branches"], "H": 4, "Hk": 1, "D": 20, "E": 36,
    },
    "half precision, forgotten at once": {
        "lengths": [7], "slots": [3], "parents": TREES["several roots"], "dtype": torch.float16, "kind": "strong",
    },
    "a float16 pool": {"lengths": [2, 3], "slots": [3, 5], "state_dtype": torch.float16},
    "no decay, columns first": {"lengths": [2, 3], "slots": [3, 5], "kind": "none", "layout": "columns first"},
    "nothing but padding": {"lengths": [0, 0], "slots": [3, -1], "padding": 5},
}  # fmt: skip

COMMITTED: dict[str, dict[str, Any]] = {
    "all": {"lengths": [5, 0, 2, 40], "slots": [6, 1, -1, 0], "accepted": [True] * 47, "padding": 2},
    "some": {
        "lengths": [4, 3, 2], "slots": [0, 5, 6], "accepted": [1, 1, 0, 0, 0, 0, 0, 1, 1], "D": 48, "E": 80,
        "index_dtype": torch.int32,
    },
    "a path of a tree": {"lengths": [7], "slots": [6], "accepted": [0, 1, 0, 0, 0, 1, 0], "dtype": torch.float16},
    "fewer heads of k": {"lengths": [3, 2], "slots": [0, 5], "accepted": [1, 1, 0, 1, 1], "H": 4, "Hk": 2},
    "a float16 pool": {"lengths": [3, 2], "slots": [0, 5], "accepted": [1, 1, 0, 1, 0], "state_dtype": torch.float16},
    "none": {"lengths": [3, 2], "slots": [0, 5], "accepted": [0] * 5},
    "a layer of a larger pool": {
        "lengths": [1, 40], "slots": [2, 4], "accepted": [1] + [0] * 39 + [1], "layout": "layer", "kind": "none",
    },
}  # fmt: skip


def case(table: dict[str, dict[str, Any]], name: str, **others: Any) -> Call:
    options = {**table[name], **others}
    options.setdefault("lengths", [1] * len(options["slots"]))
    if "accepted" in options:
        options["accepted"] = [bool(x) for x in options["accepted"]]
    return make_call(**options)
