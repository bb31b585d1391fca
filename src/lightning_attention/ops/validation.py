"""Every check of an argument, once. Errors name the argument, what came and what is wanted."""

import operator
from itertools import pairwise
from sys import float_info
from typing import SupportsIndex

import torch
from torch import Tensor

from lightning_attention.ops import transforms

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)
STATES = (torch.float32, torch.bfloat16, torch.float16)
_STATES_OF_FLOAT64 = (*STATES, torch.float64)


def integer(name: str, value: SupportsIndex, least: int | None = None, most: int | None = None) -> int:
    """The value as an int. Raises a TypeError for a bool or what is no integer, a ValueError out of the range."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is a {type(value).__name__}; it must be an integer") from None
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name} is {number}; it must be at most {most}")
    return number


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; pack its sequences one after another and pass cu_seqlens")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {str(x.layout).removeprefix('torch.')}; it must be a dense tensor")


def check_floats(name: str, x: object) -> None:
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {str(x.dtype).removeprefix('torch.')}; it must be of floating point")


def check_shape(name: str, x: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    if x.shape != wanted:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {meaning} = {list(wanted)}")


def check_rank(name: str, x: Tensor, meaning: str) -> None:
    """Check that it is a tensor of as many dimensions as are named, separated by commas."""
    check_tensor(name, x)
    if x.ndim != meaning.count(",") + 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {meaning}")


def check_dtype(name: str, x: Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in wanted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        raise TypeError(f"{name} has dtype {str(x.dtype).removeprefix('torch.')}; it must be {names}")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {like.device}, where the other inputs are")


def check_kv(k: Tensor, v: Tensor, leading: str) -> None:
    """Check k [*leading, Hk, D] and v [*leading, H, E], Hk dividing H: one dtype and device, and a unit last stride."""
    _check_vectors("k", k, leading)
    _check_vectors("v", v, leading)
    check_dtype("k", k, FLOATS)
    check_dtype("v", v, (k.dtype,))
    check_device("v", v, k)
    if v.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"v has shape {list(v.shape)}; all but the last two sizes must be those of k, {list(k.shape)}")
    if k.shape[-2] < 1 or k.shape[-1] < 1 or 0 in v.shape[-2:]:
        raise ValueError(f"k has shape {list(k.shape)} and v {list(v.shape)}; H, D and E must be at least 1")
    if v.shape[-2] % k.shape[-2]:
        raise ValueError(f"v has {v.shape[-2]} heads; it must have a multiple of the {k.shape[-2]} of k")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, leading: str) -> None:
    """Check q and k [*leading, Hk, D], v [*leading, H, E], Hk dividing H, and log_decay [H].

    They have one dtype and device, and unit last strides.
    """
    try:
        if _is_right(q, k, v, log_decay, len(leading) + 2):
            return
    except (RuntimeError, NotImplementedError, AttributeError):
        pass  # of a nested or sparse tensor, which has no shape or no strides: what follows says so
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_vectors(name, x, leading)
    if q.shape != k.shape:
        raise ValueError(f"k has shape {list(k.shape)}; it must be that of q, {list(q.shape)}")
    if q.dtype == v.dtype:
        check_dtype("k", k, (q.dtype,))
    if q.device == v.device:
        check_device("k", k, q)
    check_kv(k, v, leading)
    check_dtype("q", q, (k.dtype,))
    check_device("q", q, k)
    check_log_decay(log_decay, v)


def _is_right(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, rank: int) -> bool:
    """All of what ``check_inputs`` wants, but float64 decays, in one look: a third of the time of finding a fault."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    shape, values, dtype, device = q.shape, v.shape, q.dtype, q.device
    return (
        len(shape) == rank
        and shape == k.shape
        and shape[-1] > 0
        and shape[-2] > 0
        and (shape == values or (len(values) == rank and _fits(shape, values)))
        and dtype == k.dtype
        and dtype == v.dtype
        and dtype in FLOATS
        and device == k.device
        and device == v.device
        and q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1
        and (
            log_decay is None
            or (
                isinstance(log_decay, Tensor)
                and log_decay.dtype == torch.float32
                and log_decay.layout == torch.strided
                and log_decay.shape == (values[-2],)
                and log_decay.device == device
            )
        )
    )


def _fits(keys: torch.Size, values: torch.Size) -> bool:
    """Whether v may have this shape beside this one of k, of the same length and of one head or more."""
    return keys[:-2] == values[:-2] and values[-2] > 0 and values[-2] % keys[-2] == 0 and values[-1] > 0


def _check_vectors(name: str, x: Tensor, leading: str) -> None:
    check_rank(name, x, f"[{', '.join([*leading, 'H', 'E' if name == 'v' else 'D'])}]")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {list(x.stride())}; the last must be 1")


def check_no_grad(**tensors: Tensor | None) -> None:
    """Refuse inputs that require grad: autograd would record the insides, and keep every state of the pool."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and transforms.has_tangent(x):
            raise ValueError(f"{name} has a tangent of forward-mode differentiation; this operation has no derivative")
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(f"{name} requires grad; this operation has no derivative, call it under torch.no_grad()")


def checked_scale(scale: float | None, q: Tensor) -> float:
    """The factor on the output, as a float: D^(-1/2) for None."""
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if not isinstance(scale, (float, int)):
        raise TypeError(f"scale is a {type(scale).__name__}; it must be a float or None, for D^(-1/2)")
    if not abs(scale) <= float_info.max:
        raise ValueError(f"scale is {scale if isinstance(scale, float) else 'too large'}; it must be a finite float")
    return scale * 1.0  # an integer would compile kernels for one, and a float then be taken for it


def check_log_decay(log_decay: Tensor | None, v: Tensor) -> None:
    if log_decay is None:
        return
    check_tensor("log_decay", log_decay)
    H = v.shape[-2]
    if log_decay.shape != (H,):
        slopes = ", and of slopes log_decay is -slopes.flatten()" if log_decay.shape == (H, 1, 1) else ""
        raise ValueError(
            f"log_decay has shape {list(log_decay.shape)}; it must be [H] = [{H}], one per head of v{slopes}"
        )
    # float64 only where everything is: gradcheck perturbs it by less than float32 resolves.
    wanted = (torch.float32,) if v.dtype != torch.float64 else (torch.float32, torch.float64)
    check_dtype("log_decay", log_decay, wanted)
    check_device("log_decay", log_decay, v)


def check_log_decay_values(log_decay: Tensor | None) -> None:
    """Check the numbers themselves, only where reading them costs no synchronisation."""
    if log_decay is None or not log_decay.is_cpu:
        return
    for head, value in enumerate(log_decay.tolist()):
        if not value <= 0:
            raise ValueError(
                f"log_decay[{head}] is {value}; it must be at most 0, the natural logarithm of a decay λ in [0, 1] per "
                "token (-inf: no memory). Where other libraries take slopes, log_decay is their negative"
            )


def state_dtype(q: Tensor) -> torch.dtype:
    """The dtype of initial and final states: float32, and float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _state_dtypes(q: Tensor) -> tuple[torch.dtype, ...]:
    return _STATES_OF_FLOAT64 if q.dtype == torch.float64 else STATES


def check_initial_state(initial_state: Tensor | None, q: Tensor, v: Tensor, num_sequences: int) -> None:
    if initial_state is None:
        return
    check_tensor("initial_state", initial_state)
    wanted = (num_sequences, v.shape[-2], q.shape[-1], v.shape[-1])
    check_shape("initial_state", initial_state, wanted, "[N, H, D, E]")
    check_dtype("initial_state", initial_state, _state_dtypes(q))
    check_device("initial_state", initial_state, q)


def check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    check_dtype("cu_seqlens", cu_seqlens, INDICES)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [N+1] with N at least 1")
    check_device("cu_seqlens", cu_seqlens, q)


def check_cu_seqlens_values(cu_seqlens: Tensor | None, num_tokens: int) -> None:
    """Check the numbers themselves, only where reading them costs no synchronisation."""
    if cu_seqlens is None or not cu_seqlens.is_cpu:
        return
    cuts = cu_seqlens.tolist()  # a list: for the few numbers of a call a tenth of the time of tensor operations
    if cuts[0] != 0 or any(stop < start for start, stop in pairwise(cuts)):
        raise ValueError(f"cu_seqlens is {_shown(cuts)}; it must start at 0 and never decrease")
    if cuts[-1] > num_tokens:
        raise ValueError(f"cu_seqlens ends at {cuts[-1]}; it must not pass the {num_tokens} tokens of q")


def check_pool(
    state: Tensor, q: Tensor, v: Tensor, slots: Tensor | None, num_sequences: int, is_quantized: bool = False
) -> None:
    """Check a pool of states [S, H, D, E] and the rows of it, ``slots`` [N], that the sequences own.

    ``is_quantized``: ``state`` is the first plane of QuantizedStates.
    """
    if is_quantized:
        _check_states("state.high", state, "S", q, v, (torch.int8,))
    else:
        _check_states("state", state, "S", q, v, _state_dtypes(q))
    if slots is None:
        if state.shape[0] != num_sequences:
            raise ValueError(
                f"state has {state.shape[0]} rows; without slots it must have one per sequence, {num_sequences}"
            )
        return
    check_index("slots", slots, (num_sequences,), "[N]", q)


def _check_states(name: str, states: Tensor, rows: str, q: Tensor, v: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, states)
    if states.ndim != 4 or states.shape[1:] != (v.shape[-2], q.shape[-1], v.shape[-1]):
        wanted = f"[{rows}, H, D, E] = [{rows}, {v.shape[-2]}, {q.shape[-1]}, {v.shape[-1]}]"
        raise ValueError(f"{name} has shape {list(states.shape)}; it must be {wanted}")
    check_dtype(name, states, dtypes)
    check_device(name, states, q)
    if any(stride == 0 and size > 1 for stride, size in zip(states.stride(), states.shape, strict=True)):
        raise ValueError(f"{name} has strides {list(states.stride())}; its numbers must each have a place of their own")


def check_out(out: Tensor, v: Tensor) -> None:
    """Check where the outputs go."""
    check_tensor("out", out)
    check_shape("out", out, v.shape, "the shape of v")
    check_dtype("out", out, (v.dtype,))
    check_device("out", out, v)
    if not out.is_contiguous():
        raise ValueError(f"out has strides {list(out.stride())}; it must be contiguous")
    check_no_grad(out=out)


def check_index(
    name: str, x: Tensor, wanted: tuple[int, ...], meaning: str, q: Tensor, dtypes: tuple[torch.dtype, ...] = INDICES
) -> None:
    """Check an index tensor or, with ``dtypes`` (torch.bool,), a mask."""
    check_tensor(name, x)
    check_shape(name, x, wanted, meaning)
    check_dtype(name, x, dtypes)
    check_device(name, x, q)


def check_slots(slots: Tensor | None, state: Tensor) -> None:
    """Check rows of a pool, in any number."""
    if slots is not None:
        check_tensor("slots", slots)
        check_index("slots", slots, (slots.numel(),), "[N]", state)


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor, slots: Tensor | None,
    is_quantized: bool,
) -> int:  # fmt: skip
    """Check what operations on packed sequences [T, H, *] and a pool have in common; returns N."""
    check_inputs(q, k, v, log_decay, "T")
    check_cu_seqlens(cu_seqlens, q)
    check_no_grad(q=q, k=k, v=v, log_decay=log_decay, state=state)
    N = cu_seqlens.shape[0] - 1
    check_pool(state, q, v, slots, N, is_quantized)
    return N


def check_snapshots(snapshot_at: Tensor | None, snapshot_slots: Tensor | None, num_sequences: int, q: Tensor) -> None:
    if snapshot_at is None and snapshot_slots is None:
        return
    if snapshot_slots is None:
        raise ValueError("snapshot_at came without snapshot_slots; snapshots want both")
    if snapshot_at is None:
        raise ValueError("snapshot_slots came without snapshot_at; snapshots want both")
    check_tensor("snapshot_at", snapshot_at)
    wanted = (num_sequences, snapshot_at.shape[-1] if snapshot_at.ndim else 0)
    check_index("snapshot_at", snapshot_at, wanted, "[N, P]", q)
    check_index("snapshot_slots", snapshot_slots, wanted, "[N, P]", q)


def check_draft_snapshots(
    snapshots: Tensor | None, snapshot_slots: Tensor | None, num_sequences: int, q: Tensor, v: Tensor
) -> None:
    """Check a pool [R, H, D, E] for the states after drafts, and which row of it is whose."""
    if snapshots is None and snapshot_slots is None:
        return
    if snapshot_slots is None:
        raise ValueError("snapshots came without snapshot_slots; states after drafts want both")
    if snapshots is None:
        raise ValueError("snapshot_slots came without snapshots; states after drafts want both")
    _check_states("snapshots", snapshots, "R", q, v, _state_dtypes(q))
    check_no_grad(snapshots=snapshots)
    check_tensor("snapshot_slots", snapshot_slots)
    wanted = (num_sequences, snapshot_slots.shape[-1] if snapshot_slots.ndim else 0)
    check_index("snapshot_slots", snapshot_slots, wanted, "[N, P]", q)


def check_slot_values(slots: Tensor | None, num_slots: int, snapshot_slots: Tensor | None = None) -> None:
    """Check the numbers themselves, only where reading them costs no synchronisation."""
    owned = None if slots is None else _distinct("slots", slots, num_slots)
    if snapshot_slots is None:
        return
    taken = _distinct("snapshot_slots", snapshot_slots, num_slots)
    shared = taken if owned is None else taken & owned
    if shared:
        raise ValueError(f"snapshot_slots holds {min(shared)}, the row of a sequence of the call; it must be another")


def check_draft_snapshot_values(snapshot_slots: Tensor | None, snapshots: Tensor | None, cu_seqlens: Tensor) -> None:
    """Check the numbers themselves, of drafts that are there, only where reading them costs no synchronisation."""
    if snapshot_slots is None or snapshots is None or not snapshot_slots.is_cpu:
        return
    there = torch.arange(snapshot_slots.shape[1], device="cpu") < cu_seqlens.diff()[:, None]
    _distinct("snapshot_slots", snapshot_slots[there], snapshots.shape[0], "snapshots")


def _distinct(name: str, slots: Tensor, num_slots: int, pool: str = "state") -> set[int]:
    """The slots that are not padding; none where they are not on the CPU."""
    if not slots.is_cpu:
        return set()
    given = slots.flatten().tolist()
    owned = [slot for slot in given if slot >= 0]
    distinct = set(owned)
    if distinct and max(distinct) >= num_slots:
        raise ValueError(f"{name} holds {max(distinct)}; {pool} has {num_slots} rows (negative slots are padding)")
    if len(distinct) != len(owned):
        raise ValueError(f"{name} is {_shown(given)}; a slot must not be given twice in one call")
    return distinct


def check_parents_values(parents: Tensor | None, cu_seqlens: Tensor) -> None:
    """Check the numbers themselves, only where reading them costs no synchronisation."""
    if parents is None or not parents.is_cpu:
        return
    given = parents.tolist()
    for start, stop in pairwise(cu_seqlens.tolist()):
        for own, parent in enumerate(given[start:stop]):
            if not -1 <= parent < own:
                raise ValueError(
                    f"parents[{start + own}] is {parent}; draft {own} of its sequence wants an earlier draft or -1"
                )


def check_accepted_values(accepted: Tensor, parents: Tensor | None, cu_seqlens: Tensor, slots: Tensor | None) -> None:
    """Check that the accepted drafts of a sequence are one path from its state, only where reading them is free."""
    if not accepted.is_cpu:
        return
    taken = accepted.tolist()
    given = None if parents is None else parents.tolist()
    owners = None if slots is None else slots.tolist()
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        last = -1
        for own in range(stop - start):
            if not taken[start + own] or (owners is not None and owners[n] < 0):
                continue
            parent = own - 1 if given is None else given[start + own]
            if parent != last:
                before = "the state" if parent < 0 else f"draft {parent}"
                raise ValueError(
                    f"accepted[{start + own}] is True; draft {own} of its sequence follows {before}, and the accepted "
                    f"one before it is {'none' if last < 0 else last}. The accepted drafts of a sequence must be one "
                    f"path from its state{' (of a tree, pass its parents)' if given is None else ''}"
                )
            last = own


def _shown(values: list[int]) -> str:
    return f"[{', '.join(map(str, values[:8]))}{', …' if len(values) > 8 else ''}]"
