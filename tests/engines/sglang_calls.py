"""Calls of ``seg_la_fwd``, ours and SGLang's own, and what they must give in float64."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers._sglang import sglang
from lightning_attention import decay
from lightning_attention.integrations.sglang import seg_la_fwd
from tests.kernels.triton.support.interpreter import scalar_masks
from tests.support import ReferencePool, cumulative, relative_error
from tests.support.rings import by_backend

#: SGLang's own grid for this backend (page sizes are nothing to the kernel): prefixes and lengths of the requests. A
#: prefix of none starts from zero. Then what an engine sends beside it.
CALLS: dict[str, dict[str, Any]] = {
    "page size 1": {"lengths": [3, 1]},
    "a whole page": {"lengths": [16], "starts": [True]},
    "page edges": {"lengths": [15, 16, 17], "starts": [True] * 3},
    "a prefix of a page": {"lengths": [2]},
    "to the end of a page": {"lengths": [8]},
    "ragged": {"lengths": [15, 8, 1], "starts": [True, False, False]},
    "decode": {"lengths": [1, 1, 1]},
    "decode of one": {"lengths": [1]},
    "decode with padding": {"lengths": [1, 1, 1, 1], "slots": [3, 6, -1, -1]},
    "prefill with padding": {"lengths": [5, 40, 3], "slots": [3, -1, 1]},
    "tracked": {"lengths": [70, 64, 33, 5], "track": [(64, 4), (64, 5), (0, 2), (5, -1)], "scale": 1.0},
    "tracked at the end": {"lengths": [40, 33], "track": [(32, 4), (33, 5)], "starts": [True, False]},
    "drafts": {"lengths": [4, 4, 4], "drafts": True},
    "drafts with padding": {"lengths": [3, 3, 3], "slots": [3, -1, 1], "drafts": True},
    "a tree": {"lengths": [16], "parents": [-1, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 8, 9, 12, 14]},
}
#: What SGLang's function does not do, or does for other requests: drafts as a tree, with states; of several lengths.
MORE: dict[str, dict[str, Any]] = {
    "a tree with states": {"lengths": [3, 3], "parents": [-1, 0, 0, -1, 0, 1], "drafts": True},
    "ragged drafts": {"lengths": [4, 1, 2], "drafts": True},
    "trees": {"lengths": [3, 3], "parents": [-1, 0, 0, -1, -1, 1]},
    "one draft each": {"lengths": [1, 1], "drafts": True},
    "any width": {"lengths": [5, 7], "D": 20},
    "fewer tokens than requests": {"lengths": [1, 0, 0]},
    "trees with padding": {"lengths": [3, 3, 3], "slots": [-1, 3, -1], "parents": [-1, 0, 0, -1, -1, 1, -1, 0, 1]},
    "tracked with padding": {"lengths": [40, 33, 5], "slots": [3, -1, 1], "track": [(32, 4), (33, 5), (5, -1)]},
    "drafts that are all padding": {"lengths": [2, 2], "slots": [-1, -1], "drafts": True},
    "any negative slot": {"lengths": [1, 1, 1], "slots": [-1, 3, -7]},
    "decode of a layer's pool": {"lengths": [1, 1, 1], "slots": [3, -1, 1], "layout": "beside other layers'"},
    "prefill of a layer's pool": {"lengths": [40, 3], "track": [(32, 4), (3, 5)], "layout": "beside other layers'"},
    "drafts of a layer's pool": {"lengths": [3, 3], "drafts": True, "layout": "beside other layers'"},
    "decode of a transposed pool": {"lengths": [1, 1, 1], "slots": [3, -1, 1], "layout": "transposed"},
    "prefill of a transposed pool": {"lengths": [40, 3], "track": [(32, 4), (3, 5)], "layout": "transposed"},
    "drafts of a transposed pool": {"lengths": [3, 3], "drafts": True, "layout": "transposed"},
}


@dataclass
class Meta:
    """The fields of SGLang's ``SegLaMeta``."""

    batch_size: int
    max_q_length: int | None
    q_offsets: Tensor
    s_offsets: Tensor
    q_lengths: Tensor
    s_scales: Tensor
    s_offsets_stride: int = 0
    q_offsets_stride: int = 0
    s_scales_stride: int = 0
    decay_scales_stride: int = 0
    mask: Tensor | None = None


@dataclass(frozen=True)
class SegLa:
    """Requests of these lengths over a pool of 8 rows; ``drafts`` keeps their states, ``mask`` makes trees of them.

    q, k and v of padding are NaN. ``layout``: how the pool lies in memory.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pool: Tensor
    slopes: Tensor
    lengths: list[int]
    slots: list[int]
    starts: list[bool]
    drafts: bool = False
    parents: list[int] | None = None
    track: list[tuple[int, int]] | None = None
    scale: float | None = None
    layout: str = "dense"

    @property
    def owners(self) -> list[int]:
        """The slot of each token."""
        return [slot for slot, length in zip(self.slots, self.lengths, strict=True) for _ in range(length)]


def make(
    lengths: list[int],
    slots: list[int] | None = None,
    *,
    starts: list[bool] | None = None,
    H: int = 2,
    D: int = 128,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    **others: Any,
) -> SegLa:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), H, D, generator=generator).to(dtype) for _ in range(3))
    pool = torch.randn(8, H, D, D, generator=generator).to(state_dtype)
    slots = [3, 0, 6, 1, 7, 2][: len(lengths)] if slots is None else slots
    for n, slot in enumerate(slots):
        if slot < 0:
            for x in (q, k, v):
                x[sum(lengths[:n]) : sum(lengths[: n + 1])] = torch.nan
    slopes = -decay.alibi(H)[:, None, None]
    return SegLa(q, k, v, pool, slopes, lengths, slots, starts or [False] * len(lengths), **others)


def on(device: str, call: SegLa) -> SegLa:
    moved = {f.name: x.to(device) for f in fields(call) if isinstance(x := getattr(call, f.name), Tensor)}
    return replace(call, **moved)


def mask_of(parents: list[int], P: int) -> Tensor:
    """[N, P, P], as EAGLE has it."""
    mask = torch.zeros(len(parents) // P, P, P, dtype=torch.bool)
    for n in range(len(mask)):
        for i in range(P):
            parent = parents[n * P + i]
            if parent >= 0:
                mask[n, i] = mask[n, parent]
            mask[n, i, i] = True
    return mask


def _laid_out(pool: Tensor, layout: str) -> Tensor:
    if layout == "beside other layers'":
        return torch.stack([pool, pool, pool], 1)[:, 1]
    return pool.mT.contiguous().mT if layout == "transposed" else pool.clone()


def prepared(call: SegLa, own: bool) -> tuple[Callable[[], Tensor], Tensor, Tensor | None]:
    """The call, the pool and the states after drafts that it writes; ``own``: by our function, else by SGLang's."""
    device, N = call.q.device, len(call.lengths)

    def indices(x: list[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int32, device=device)

    bounds = cumulative(call.lengths, torch.int32).to(device)
    theirs = None if own else sglang("seg_la.py")
    make_meta: Any = Meta if theirs is None else theirs.SegLaMeta
    meta = make_meta(
        batch_size=N, max_q_length=None, q_offsets=bounds, s_offsets=indices(call.slots), q_lengths=bounds.diff(),
        s_scales=~torch.tensor(call.starts, device=device),
    )  # fmt: skip
    more: dict[str, Any] = {}
    if call.parents is not None:
        meta.mask = mask_of(call.parents, call.lengths[0]).to(device)
    if call.drafts:
        P = max(call.lengths)
        more["caches"] = torch.full((N + 2, P, *call.pool.shape[1:]), torch.nan, device=device)
        more["cache_indices"] = indices(list(range(1, N + 1)))
    if call.track is not None:
        at, to = zip(*call.track, strict=True)
        more |= {"track_lens": indices(list(at)), "track_state_indices": indices(list(to))}
    pool = _laid_out(call.pool, call.layout)
    function = seg_la_fwd if theirs is None else theirs.seg_la_fwd
    arguments = (call.q, call.k, call.v, pool, call.slopes, meta)
    return partial(function, *arguments, **more, softmax_scale=call.scale), pool, more.get("caches")


def run(call: SegLa, own: bool = True, interpreted: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs, the pool after it, and the states after drafts; ``interpreted``: ours by the kernels, on a CPU."""
    made, pool, caches = prepared(call, own)
    by_kernels = by_backend("triton" if interpreted else None)
    with scalar_masks() if call.q.device.type == "cpu" and not own else by_kernels:
        return made(), pool, caches


def check(
    call: SegLa, got: tuple[Tensor, Tensor, Tensor | None], tolerance: float, state_tolerance: float, own: bool = True
) -> None:
    """Outputs, and every row of the pool, against float64. SGLang's own does not write the outputs of padding."""
    out, pool, caches = (None if x is None else x.cpu() for x in got)
    assert out is not None
    assert pool is not None
    call = on("cpu", call)
    reference = ReferencePool(call.pool, -call.slopes.flatten(), call.q.shape[2] ** -0.5 if call.scale is None else 1.0)
    snapshots = [[pair] if pair[0] > 0 else [] for pair in call.track or ()]
    if call.drafts or call.parents is not None:
        expected = reference.verify(call.q, call.k, call.v, call.lengths, call.slots, call.parents)
    else:
        expected = reference.prefill(call.q, call.k, call.v, call.lengths, call.slots, call.starts, snapshots)
    used = [t for t, slot in enumerate(call.owners) if slot >= 0]
    assert out.shape == call.v.shape
    assert out.dtype == call.v.dtype
    assert relative_error(out[used], expected[used]) <= tolerance
    if own:
        assert not out[[t for t, slot in enumerate(call.owners) if slot < 0]].any()
    for row in range(8):
        assert relative_error(pool[row], reference.states[row]) <= state_tolerance
    if not call.drafts:
        return
    assert caches is not None
    t = 0
    for n, length in enumerate(call.lengths):
        for i in range(length):
            after = reference.after_drafts[t]
            if after is not None:
                assert relative_error(caches[1 + n, i], after) <= state_tolerance
            else:
                assert caches[1 + n, i].isnan().all()
            t += 1
    assert caches[[0, -1]].isnan().all()


def absent() -> None:
    """Skip a test where SGLang's file is not there, and say so."""
    try:
        sglang("seg_la.py")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
