"""vLLM's linear attention of MiniMax and Bailing (Ling, Ring) by this project's operations.

    from lightning_attention.integrations.vllm import apply_lightning_attention
    apply_lightning_attention()  # in every worker

docs/engines.md says what equals the original and what does not.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from lightning_attention.integrations.engines import Functions, log_decay_of, put_back, put_in_place
from lightning_attention.ops.decode import lightning_attention_decode
from lightning_attention.ops.prefill import lightning_attention_prefill
from lightning_attention.ops.speculative import lightning_attention_verify

_FOLDER = "vllm.model_executor.layers.mamba.linear."
_PREPARED = "_lightning_attention_prefills"  # on the metadata of a step


def clear_linear_attention_cache_for_new_sequences(
    kv_cache: Tensor, state_indices_tensor: Tensor, attn_metadata: Any
) -> None:
    """Nothing: :func:`linear_attention_prefill_and_mix` starts new sequences from zero, whatever their rows hold.

    vLLM's reads on the host, for one request after another, how long its context is.
    """


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Tensor,
    slope_rate: Tensor,
    state_indices_tensor: Tensor,
    q_start: int = 0,
    q_end: int | None = None,
    slot_start: int = 0,
    slot_end: int | None = None,
    block_size: int = 32,  # noqa: ARG001 (vLLM's tiles)
) -> Tensor:
    """One token for each of some requests.

    Args:
        q: [T, H, D], of which tokens ``q_start`` to ``q_end`` are read; any strides with a unit last one.
        k: [T, H, D], of q's dtype.
        v: [T, H, D], of q's dtype.
        kv_cache: [S, H, D, D] float32, bfloat16 or float16, the pool; updated in place.
        slope_rate: [H, 1, 1] float32: a decay is exp(−slope). Taken for constants.
        state_indices_tensor: [N] int32 or int64, of which those from ``slot_start`` to ``slot_end`` are the requests'
            rows; negative: padding, whose outputs are zero.
        q_start: the first token.
        q_end: the token after the last.
        slot_start: the first row.
        slot_end: the row after the last.
        block_size: ignored.

    Returns:
        [tokens, H · D] in q's dtype.
    """
    q, k, v = (x[q_start:q_end] for x in (q, k, v))
    slots = state_indices_tensor[slot_start:slot_end]
    return lightning_attention_decode(q, k, v, log_decay_of(slope_rate), kv_cache, slots=slots).flatten(1)


def linear_attention_prefill_and_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Tensor,
    state_indices_tensor: Tensor,
    attn_metadata: Any,
    slope_rate: Tensor,
    block_size: int,  # noqa: ARG001 (vLLM's tiles)
    decode_fn: Callable[..., Tensor],
    prefix_fn: Callable[..., Tensor],  # noqa: ARG001 (vLLM's prefill of one request)
    layer_idx: int | None = None,  # noqa: ARG001
) -> Tensor:
    """Requests that decode, by ``decode_fn``, and after them all prompts and chunks in one call.

    Args:
        q: [T, H, D]; any strides with a unit last one.
        k: [T, H, D], of q's dtype.
        v: [T, H, D], of q's dtype.
        kv_cache: [S, H, D, D] float32, bfloat16 or float16, the pool, each [D, D] contiguous; updated in place.
        state_indices_tensor: [N] int32 or int64, the requests' rows, those that decode first.
        attn_metadata: vLLM's ``LinearAttentionMetadata`` or ``BailingLinearAttentionMetadata``. A request starts from
            zero where its query is all of ``seq_lens``. What follows from it is kept on it for the next layers.
        slope_rate: [H, 1, 1] float32: a decay is exp(−slope). Taken for constants.
        block_size: ignored.
        decode_fn: called with q, k, v, kv_cache, state_indices_tensor and attn_metadata; returns [tokens, H · D].
        prefix_fn: ignored.
        layer_idx: ignored.

    Returns:
        [tokens, H · D] in q's dtype.
    """
    decoded = attn_metadata.num_decode_tokens
    end = decoded + attn_metadata.num_prefill_tokens
    hidden = v.new_empty(end, *v.shape[1:])
    if decoded > 0:
        hidden[:decoded] = decode_fn(q, k, v, kv_cache, state_indices_tensor, attn_metadata).view(decoded, *v.shape[1:])
    if attn_metadata.num_prefills > 0:
        cu_seqlens, slots, fresh = _prefills(attn_metadata, state_indices_tensor)
        q, k, v = (x[decoded:end] for x in (q, k, v))
        lightning_attention_prefill(
            q, k, v, log_decay_of(slope_rate), kv_cache, cu_seqlens=cu_seqlens, slots=slots, fresh=fresh,
            out=hidden[decoded:],
        )  # fmt: skip
    return hidden.flatten(1)


def _prefills(attn_metadata: Any, state_indices_tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cu_seqlens, slots and fresh of the prompts and chunks of a step: the same for all layers of a cache."""
    found = getattr(attn_metadata, _PREPARED, None)
    if found is None or found[0] is not state_indices_tensor:
        first, last = attn_metadata.num_decodes, attn_metadata.num_decodes + attn_metadata.num_prefills
        cu_seqlens = attn_metadata.query_start_loc[first : last + 1] - attn_metadata.num_decode_tokens
        slots = getattr(attn_metadata, "state_indices_tensor_p", None)
        slots = state_indices_tensor[first:last] if slots is None else slots
        fresh = attn_metadata.seq_lens[first:last] == cu_seqlens.diff()
        found = state_indices_tensor, cu_seqlens, slots.contiguous(), fresh
        setattr(attn_metadata, _PREPARED, found)
    return found[1:]


def bailing_linear_attention_decode_spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Tensor,
    slope_rate: Tensor,
    state_indices_tensor: Tensor,
    query_start_loc: Tensor,
    num_accepted_tokens: Tensor,
    q_start: int,
    q_end: int | None,
    slot_start: int,
    slot_end: int | None,
    block_size: int,  # noqa: ARG001 (vLLM's tiles)
) -> Tensor:
    """Drafts of some requests, from the state after the last token that was accepted; the state after each is kept.

    Args:
        q: [T, H, D], of which tokens ``q_start`` to ``q_end`` are read; any strides with a unit last one.
        k: [T, H, D], of q's dtype.
        v: [T, H, D], of q's dtype.
        kv_cache: [S, H, D, D] float32, bfloat16 or float16, the pool; updated in place.
        slope_rate: [H, 1, 1] float32: a decay is exp(−slope). Taken for constants.
        state_indices_tensor: [N, P] int32 or int64, of which those from ``slot_start`` to ``slot_end`` are the rows of
            the requests: row i for the state after draft i, and row a − 1 has that after the a drafts of the last call
            that were accepted. Where that one is negative the request is padding, whose outputs are zero; any other
            negative one is not written.
        query_start_loc: [N+1] int32 or int64, where each request's drafts begin.
        num_accepted_tokens: [N] integers, a; below 1 counts as 1.
        q_start: the first token.
        q_end: the token after the last.
        slot_start: the first request.
        slot_end: the request after the last.
        block_size: ignored.

    Returns:
        [tokens, H · D] in q's dtype.
    """
    q, k, v = (x[q_start:q_end] for x in (q, k, v))
    rows = state_indices_tensor[slot_start:slot_end]
    N, P = rows.shape
    last = (num_accepted_tokens[:N].long() - 1).clamp(0, P - 1)
    slots = rows.gather(1, last[:, None]).squeeze(1)
    cu_seqlens = query_start_loc[: N + 1].to(q.device)
    if q_start:
        cu_seqlens = cu_seqlens - q_start
    return lightning_attention_verify(
        q, k, v, log_decay_of(slope_rate), kv_cache, cu_seqlens=cu_seqlens, slots=slots, snapshots=kv_cache,
        snapshot_slots=rows,
    ).flatten(1)  # fmt: skip


_SHARED: Functions = {
    "clear_linear_attention_cache_for_new_sequences": clear_linear_attention_cache_for_new_sequences,
    "linear_attention_decode": linear_attention_decode,
    "linear_attention_prefill_and_mix": linear_attention_prefill_and_mix,
}
_OURS: dict[str, Functions] = {
    f"{_FOLDER}minimax_linear_attn": _SHARED,
    f"{_FOLDER}bailing_linear_attn": {
        **_SHARED,
        "bailing_linear_attention_decode_spec": bailing_linear_attention_decode_spec,
    },
}


def apply_lightning_attention() -> None:
    """Compute vLLM's linear attention of MiniMax and Bailing with these functions, in this process.

    Raises:
        ModuleNotFoundError: vLLM is not installed, or has no such layers.
        ValueError: one of its functions takes other parameters than the one that is known; then none is replaced.
    """
    put_in_place(*((import_module(name), functions) for name, functions in _OURS.items()))


def remove_lightning_attention() -> None:
    """Undo :func:`apply_lightning_attention`.

    Raises:
        ValueError: another function has since been put in the place of one of these.
    """
    put_back(*((sys.modules[name], functions) for name, functions in _OURS.items() if name in sys.modules))
