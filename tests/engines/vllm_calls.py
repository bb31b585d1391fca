"""A step of a layer of vLLM's, with our functions and with its own, and what it must give in float64."""

from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers._vllm import vllm
from lightning_attention import decay
from lightning_attention.integrations import vllm as ours
from tests.kernels.triton.support.interpreter import scalar_masks
from tests.support import ReferencePool, cumulative, relative_error
from tests.support.rings import by_backend

S = 24  # rows of a pool


@dataclass(frozen=True)
class Step:
    """Requests that decode, then prompts of these lengths; ``prefixes``: tokens that each has read before.

    drafts: how many each request has that decodes, or None where it has a token; ``accepted``: of those before.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cache: Tensor
    slopes: Tensor
    decodes: int
    prompts: list[int]
    prefixes: list[int]
    rows: Tensor
    drafts: list[int] | None = None
    accepted: list[int] | None = None
    bailing: bool = True

    @property
    def lengths(self) -> list[int]:
        return [*(self.drafts or [1] * self.decodes), *self.prompts]


#: vLLM's own grid for the kernels is 4 and 8 heads of 64, one and two requests, 16 tokens, float32, with and without
#: padding. Then mixed steps, the metadata of either model, and speculation.
STEPS: dict[str, dict[str, Any]] = {
    "decode of one": {"decodes": 1, "H": 4},
    "decode of two": {"decodes": 2, "H": 8, "bailing": False},
    "decode with padding": {"decodes": 4, "H": 4, "padding": [1, 3]},
    "a prompt": {"prompts": [16], "H": 4},
    "two prompts": {"prompts": [16, 16], "H": 8, "bailing": False},
    "a prompt past a block": {"prompts": [300], "prefixes": [0]},
    "a step of everything": {"decodes": 3, "prompts": [5, 40, 17], "prefixes": [0, 9, 0]},
    "the same for MiniMax": {"decodes": 3, "prompts": [5, 40, 17], "prefixes": [0, 9, 0], "bailing": False},
    "drafts": {"decodes": 2, "drafts": [3, 3], "accepted": [1, 3]},
    "drafts with padding": {"decodes": 3, "drafts": [3, 2, 1], "accepted": [2, 1, 0], "padding": [1]},
    "drafts and prompts": {"decodes": 2, "drafts": [3, 1], "accepted": [3, 2], "prompts": [20, 6], "prefixes": [4, 0]},
}


def make(
    *,
    decodes: int = 0,
    prompts: list[int] | None = None,
    prefixes: list[int] | None = None,
    padding: list[int] | None = None,
    H: int = 2,
    D: int = 64,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    **others: Any,
) -> Step:
    """Cache rows in random order, 3 to a request; the rows of a cache page lie apart, as in vLLM's."""
    generator = torch.Generator().manual_seed(0)
    prompts = prompts or []
    lengths = [*(others.get("drafts") or [1] * decodes), *prompts]
    projected = torch.randn(sum(lengths), H, 3 * D, generator=generator).to(dtype)
    cache = torch.randn(S, H * D * D + 32, generator=generator).to(state_dtype)
    rows = torch.randperm(S, generator=generator)[: 3 * len(lengths)].view(-1, 3).to(torch.int32)
    rows[padding or []] = -1
    q, k, v = projected.split(D, -1)
    return Step(
        q, k, v, cache, -decay.alibi(H)[:, None, None], decodes, prompts, prefixes or [7] * len(prompts), rows, **others
    )


def on(device: str, step: Step) -> Step:
    moved = {f.name: x.to(device) for f in fields(step) if isinstance(x := getattr(step, f.name), Tensor)}
    return replace(step, **moved)


def pool_of(step: Step, cache: Tensor) -> Tensor:
    """A layer's kv_cache [S, H, D, D], a view of its pages."""
    (_, H, D), width = step.q.shape, step.cache.shape[1]
    return cache.as_strided((S, H, D, D), (width, D * D, D, 1))


def metadata(step: Step, own: bool = True) -> Any:
    """``LinearAttentionMetadata``, or Bailing's. vLLM's kernel for decode wants its slots dense."""
    first = step.rows[:, 0] if own else step.rows[:, 0].contiguous()
    device, decoded = step.q.device, sum(step.lengths[: step.decodes])
    bounds = cumulative(step.lengths, torch.int32).to(device)
    before = torch.tensor([7] * step.decodes + step.prefixes, dtype=torch.int32, device=device)
    found = {
        "num_prefills": len(step.prompts), "num_prefill_tokens": sum(step.prompts), "num_decodes": step.decodes,
        "num_decode_tokens": decoded, "query_start_loc": bounds, "seq_lens": before + bounds.diff(),
        "state_indices_tensor": first,
    }  # fmt: skip
    if step.bailing:
        found |= {
            "state_indices_tensor_d": first[: step.decodes], "state_indices_tensor_p": first[step.decodes :],
            "num_accepted_tokens": None, "query_start_loc_d": None,
        }  # fmt: skip
    if step.drafts is not None:
        found |= {
            "state_indices_tensor_d": step.rows[: step.decodes], "query_start_loc_d": bounds[: step.decodes + 1],
            "num_accepted_tokens": torch.tensor(step.accepted, dtype=torch.int32, device=device),
        }  # fmt: skip
    return SimpleNamespace(**found)


def functions(step: Step, own: bool) -> Any:
    """Those of a layer's module, ours or vLLM's own."""
    if own:
        return SimpleNamespace(MiniMaxText01LinearKernel=None, **ours._OURS[f"{ours._FOLDER}bailing_linear_attn"])
    theirs = vllm()
    return SimpleNamespace(**vars(theirs.minimax) | (vars(theirs.bailing) if step.bailing else {}))


def layer(step: Step, of: Any, cache: Tensor, meta: Any) -> Tensor:
    """What a layer's ``_forward`` does between its projections."""
    slots, slopes = meta.state_indices_tensor, step.slopes
    spec = getattr(meta, "num_accepted_tokens", None) is not None

    def decode(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor, state_indices: Tensor, meta: Any) -> Tensor:
        if spec:
            return of.bailing_linear_attention_decode_spec(
                q, k, v, kv_cache, slopes, meta.state_indices_tensor_d, meta.query_start_loc_d,
                meta.num_accepted_tokens, q_start=0, q_end=meta.num_decode_tokens, slot_start=0,
                slot_end=meta.num_decodes, block_size=32,
            )  # fmt: skip
        return of.linear_attention_decode(
            q, k, v, kv_cache, slopes, state_indices, q_start=0, q_end=meta.num_decode_tokens, slot_start=0,
            slot_end=meta.num_decodes, block_size=32,
        )  # fmt: skip

    kv_cache = pool_of(step, cache)
    of.clear_linear_attention_cache_for_new_sequences(kv_cache, slots, meta)
    if meta.num_prefills == 0:
        return decode(step.q, step.k, step.v, kv_cache, slots, meta)
    prefix = None if of.MiniMaxText01LinearKernel is None else of.MiniMaxText01LinearKernel.jit_linear_forward_prefix
    return of.linear_attention_prefill_and_mix(
        q=step.q, k=step.k, v=step.v, kv_cache=kv_cache, state_indices_tensor=slots, attn_metadata=meta,
        slope_rate=slopes, block_size=256, decode_fn=decode, prefix_fn=prefix, layer_idx=0,
    )  # fmt: skip


def prepared(step: Step, own: bool = True) -> tuple[partial[Tensor], Tensor]:
    """The layer's call, and the pages of its cache, which it writes."""
    cache = step.cache.clone()
    return partial(layer, step, functions(step, own), cache, metadata(step, own)), cache


def run(step: Step, own: bool = True, interpreted: bool = False) -> tuple[Tensor, Tensor]:
    """Outputs, and the cache after it; ``interpreted``: ours by the kernels, on a CPU."""
    made, cache = prepared(step, own)
    by_kernels = by_backend("triton" if interpreted else None)
    with scalar_masks() if step.q.device.type == "cpu" and not own else by_kernels:
        return made(), cache


def check(step: Step, got: tuple[Tensor, Tensor], tolerance: float, state_tolerance: float, own: bool = True) -> None:
    """Outputs of requests with a row, and every page of the cache, against float64.

    vLLM's own prefill weighs what is older than a block of 256 tokens by a decay too few, which its decode does not.
    """
    out, cache = (x.cpu() for x in got)
    step = on("cpu", step)
    reference = ReferencePool(pool_of(step, step.cache), -step.slopes.flatten())
    decoded = sum(step.lengths[: step.decodes])
    q, k, v, rows = step.q, step.k, step.v, step.rows.tolist()
    first = [row[0] for row in rows]
    if step.drafts is None:
        expected = reference.decode(q[:decoded], k[:decoded], v[:decoded], first[: step.decodes])
        owners = first[: step.decodes]
    else:
        starts = [row[max(a, 1) - 1] for row, a in zip(rows, step.accepted or [], strict=False)]
        expected = reference.verify(q[:decoded], k[:decoded], v[:decoded], step.drafts, starts)
        after = iter(reference.after_drafts)
        for n, length in enumerate(step.drafts):
            for i in range(length):
                state = next(after)
                if state is not None:
                    reference.states[rows[n][i]] = state
        owners = [start for start, length in zip(starts, step.drafts, strict=True) for _ in range(length)]
    fresh = [prefix == 0 for prefix in step.prefixes]
    before = dict(reference.states)
    of_prompts = reference.prefill(q[decoded:], k[decoded:], v[decoded:], step.prompts, first[step.decodes :], fresh)
    if not own:
        reference.states, after = before, reference.states
        of_prompts += _too_much(reference, q[decoded:], k[decoded:], v[decoded:], step, first[step.decodes :], fresh)
        reference.states = after
    expected = torch.cat([expected, of_prompts])
    used = [t for t, owner in enumerate(owners) if owner >= 0] + list(range(decoded, len(expected)))
    assert out.shape == (len(expected), step.v.shape[1] * step.v.shape[2])
    assert out.dtype == step.v.dtype
    assert relative_error(out[used], expected.flatten(1)[used]) <= tolerance
    for row, state in enumerate(pool_of(step, cache)):
        assert relative_error(state, reference.states[row]) <= state_tolerance
    assert torch.equal(cache[:, -32:], step.cache[:, -32:])  # between the pages' states


def _too_much(
    reference: ReferencePool, q: Tensor, k: Tensor, v: Tensor, step: Step, rows: list[int], fresh: list[bool]
) -> Tensor:
    """What vLLM's prefill adds to the outputs of prompts: (λ^i − λ^(i+1)) q S, i from 0, S before a block of 256."""
    extra, decay, t = torch.zeros(v.shape, dtype=torch.float64), reference.decay[:, 0, 0], 0
    for length, row, is_fresh in zip(step.prompts, rows, fresh, strict=True):
        state = torch.zeros_like(reference.states[row]) if is_fresh else reference.states[row]
        for start in range(0, length, 256):
            stop = min(start + 256, length)
            i = torch.arange(stop - start)[:, None]
            weight = decay**i - decay ** (i + 1)
            part = slice(t + start, t + stop)
            extra[part] = torch.einsum("thd,hde->the", q[part].double(), state) * weight[..., None]
            for x in range(t + start, t + stop):
                state = reference._after(state, k[x], v[x])
        t += length
    return extra


def absent() -> None:
    """Skip a test where vLLM's files are not there, and say so."""
    try:
        vllm()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
