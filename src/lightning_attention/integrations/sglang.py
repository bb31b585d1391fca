"""SGLang's ``seg_la_fwd``, the kernel of its lightning attention, by this project's operations.

    from lightning_attention.integrations.sglang import apply_lightning_attention
    apply_lightning_attention()  # in every worker

docs/engines.md says what equals the original and what does not.
"""

import sys
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_attention.integrations.engines import log_decay_of, put_back, put_in_place
from lightning_attention.ops.decode import lightning_attention_decode
from lightning_attention.ops.prefill import lightning_attention_prefill
from lightning_attention.ops.speculative import lightning_attention_verify
from lightning_attention.ops.trees import parents_of_mask

_MODULE = "sglang.kernels.ops.attention.linear.seg_la"
_META = (
    "batch_size", "max_q_length", "q_offsets", "s_offsets", "q_lengths", "s_scales", "s_offsets_stride",
    "q_offsets_stride", "s_scales_stride", "decay_scales_stride", "mask",
)  # fmt: skip


def seg_la_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    decay_scales: Tensor,
    meta: Any,
    caches: Tensor | None = None,
    cache_indices: Tensor | None = None,
    track_lens: Tensor | None = None,
    track_state_indices: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Outputs of the tokens of N requests over a pool of states, as SGLang's function of this name.

    Which of its modes it is follows from what is given, never from a number on the device: ``caches`` or ``meta.mask``,
    drafts; else as many tokens as requests, one decoding step; else a prefill.

    Args:
        q: [T, H, D], bfloat16, float16 or float32; any strides with a unit last one.
        k: [T, H, D], of q's dtype.
        v: [T, H, D], of q's dtype.
        s: [S, H, D, D], float32, bfloat16 or float16, the pool; updated in place, but for drafts.
        decay_scales: [H] or [H, 1, 1] float32, slopes: a decay is exp(−slope). They are taken for constants.
        meta: SGLang's ``SegLaMeta``, of which are read: batch_size N; q_offsets [N+1], where each request's tokens
            begin; s_offsets [N], its row of ``s``, negative for padding, whose outputs are zero; s_scales [N], in a
            prefill: it starts from zero where not above 0; mask [N, P, P], for P drafts each: which drafts each sees.
        caches: [R, P, H, D, D], for drafts: the state after draft i of request n goes to row ``cache_indices[n]``, i.
        cache_indices: [N] int32 or int64, with ``caches``.
        track_lens: [N], in a prefill: the state after so many tokens of the call, where that is above 0, is also
            written to row ``track_state_indices[n]`` of ``s``.
        track_state_indices: [N], with ``track_lens``; negative: none.
        softmax_scale: factor on the output; None: D^-½.

    Returns:
        [T, H, D] in q's dtype.

    Raises:
        TypeError, ValueError: as the operations; ``caches`` comes without ``cache_indices``, or its rows do not lie one
            after the other.
    """
    N, (T, _, D) = meta.batch_size, q.shape
    log_decay = log_decay_of(decay_scales)
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    slots = meta.s_offsets[:N]
    drafts = caches is not None or meta.mask is not None
    if T == N and not drafts:
        return lightning_attention_decode(q, k, v, log_decay, s, slots=slots, scale=scale)
    cu_seqlens = meta.q_offsets[: N + 1]
    if drafts:
        snapshots, rows = (None, None) if caches is None else _rows_of(caches, cache_indices, N)
        parents = None if meta.mask is None else parents_of_mask(meta.mask.view(N, -1, meta.mask.shape[-1]))
        return lightning_attention_verify(
            q, k, v, log_decay, s, cu_seqlens=cu_seqlens, slots=slots, parents=parents, scale=scale,
            snapshots=snapshots, snapshot_slots=rows,
        )  # fmt: skip
    at = to = None
    if track_lens is not None and track_state_indices is not None:
        at = track_lens[:N, None]
        to = torch.where(at > 0, track_state_indices[:N, None], -1)
    return lightning_attention_prefill(
        q, k, v, log_decay, s, cu_seqlens=cu_seqlens, slots=slots, fresh=meta.s_scales[:N] <= 0, scale=scale,
        snapshot_at=at, snapshot_slots=to,
    )  # fmt: skip


def _rows_of(caches: Tensor, cache_indices: Tensor | None, N: int) -> tuple[Tensor, Tensor]:
    """Caches as a pool of states, and its row for each draft of each request, [N, P]."""
    if cache_indices is None:
        raise ValueError("caches came without cache_indices; states after drafts want both")
    P = caches.shape[1]
    if caches.stride(0) != P * caches.stride(1):
        raise ValueError(f"caches has strides {list(caches.stride())}; the first must be {P} times the second")
    draft = torch.arange(P, device=caches.device)
    return caches.flatten(0, 1), torch.add(draft, cache_indices[:N, None], alpha=P)


_OURS = {"seg_la_fwd": seg_la_fwd}


def apply_lightning_attention() -> None:
    """Compute SGLang's lightning attention with this function, wherever the process has imported it or will.

    Raises:
        ModuleNotFoundError: SGLang is not installed, or has no such kernel.
        ValueError: its function takes other parameters than the one that is known, or its ``SegLaMeta`` has other
            fields.
    """
    module = import_module(_MODULE)
    found = tuple(field.name for field in fields(module.SegLaMeta))
    if found != _META:
        raise ValueError(f"{_MODULE}.SegLaMeta has the fields {', '.join(found)}; what is known has {', '.join(_META)}")
    put_in_place((module, _OURS))


def remove_lightning_attention() -> None:
    """Undo :func:`apply_lightning_attention`.

    Raises:
        ValueError: another function has since been put in the place of this one.
    """
    if _MODULE in sys.modules:
        put_back((sys.modules[_MODULE], _OURS))
