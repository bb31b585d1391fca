"""cuLA's CuTe DSL kernels of lightning attention: decode, drafts, and the forward pass; it has no backward pass.

Its states are [V, K], ours transposed, and a pool is kept in its order from the start.
"""

from types import ModuleType

import torch
from torch import Tensor

from benchmarks.harness.pool import DECODE, PREFILL, SPECULATE, Batch, Bound
from benchmarks.peers._checkout import checkout
from benchmarks.peers._slopes import slopes_of
from lightning_attention.bench.peers import ATTENTION, PACKED_ATTENTION, Forward, Peer


def _cula() -> ModuleType:
    return checkout("cula.lightning", "github.com/inclusionAI/cuLA")


def _attention(cu_seqlens: Tensor | None = None) -> Forward:
    cula = _cula()

    def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        slopes = slopes_of(log_decay, q.shape[2], q.device)
        if cu_seqlens is None:
            out: Tensor = cula.lightning_attn_fwd(q, k, v, slopes, scale=1.0)[0]
        else:
            out = cula.lightning_attn_fwd_varlen(q, k, v, slopes, cu_seqlens, scale=1.0)[0]
        return out

    return forward


def _decode(b: Batch) -> Bound:
    step, D = _cula().linear_attention_decode, b.q.shape[-1]
    slopes, pool, out = -b.log_decay, b.pool.mT.contiguous(), torch.empty_like(b.q)
    rows = pool.flatten(0, 1)
    unused = dict.fromkeys(("stride_q", "stride_k", "stride_v", "stride_s", "stride_o"), 0)

    def call() -> Tensor:
        step(
            b.q, b.k, b.v, rows, out, softmax_scale=1.0, s_offsets=b.slots, decay_scales=slopes,
            HEAD_DIM=D, K_SPLIT_DIM=D, V_SPLIT_DIM=D, **unused,
        )  # fmt: skip
        return out

    return Bound(call, lambda: pool[b.slots.long()].mT)


def _prefill(b: Batch) -> Bound:
    """Its prompts start from what the pool has: where they are fresh, the pool is cleared in the same call."""
    prefill = _cula().lightning_attn_fwd_varlen
    slopes, pool, slots = -b.log_decay, b.pool.mT.contiguous(), b.slots.long()

    def call() -> Tensor:
        if b.fresh:
            pool.index_fill_(0, slots, 0)
        out: Tensor = prefill(
            b.q[None], b.k[None], b.v[None], slopes, b.cu_seqlens, scale=1.0, state_pool=pool,
            initial_state_indices=b.slots,
        )[0]  # fmt: skip
        return out

    return Bound(call, lambda: pool[slots].mT)


def _speculate(b: Batch) -> Bound:
    """Drafts, all accepted. Its q, k and v are float32, and are so before the call that is timed."""
    cula, drafts = _cula(), b.q.shape[0] // b.N
    q, k, v = (x.float().unflatten(0, (b.N, drafts)) for x in (b.q, b.k, b.v))
    slopes, pool, out = -b.log_decay, b.pool.mT.contiguous(), torch.empty_like(v)
    kept = [x.new_empty(b.pool.shape[0], *x.shape[1:]) for x in (k, v)]
    accepted = torch.full_like(b.slots, drafts)

    def call() -> Tensor:
        cula.linear_attention_verify_kvbuffer(q, k, v, pool, out, slopes, b.slots, 1.0, drafts, *kept)
        cula.linear_attention_state_update_kvbuffer(*kept, pool, slopes, b.slots, accepted, drafts)
        return out

    return Bound(call, lambda: pool[b.slots.long()].mT)


PEERS = (
    Peer("cula", "cuLA", "cuda-linear-attention",
         {ATTENTION: _attention, PACKED_ATTENTION: _attention, DECODE: _decode, PREFILL: _prefill,
          SPECULATE: _speculate},
         states=(torch.float32,), backward=False),
)  # fmt: skip
