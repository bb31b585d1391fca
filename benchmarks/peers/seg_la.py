"""SGLang's kernel for a pool of states: decode, prefill and speculation.

It verifies by writing the state after every draft; to commit is to copy the last one accepted into the pool.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.pool import DECODE, PREFILL, SPECULATE, Batch, Bound, pooled
from benchmarks.peers._sglang import sglang
from lightning_attention.bench.peers import Peer


def _forward(of: Any, b: Batch) -> Any:
    """``seg_la_fwd`` of a module as a function of the pool and of what it takes beside."""
    meta = of.SegLaMeta(
        batch_size=b.N, max_q_length=None, q_offsets=b.cu_seqlens, s_offsets=b.slots, q_lengths=b.cu_seqlens.diff(),
        s_scales=torch.full_like(b.slots, int(not b.fresh)),
    )  # fmt: skip
    slopes = -b.log_decay
    return lambda pool, **more: of.seg_la_fwd(b.q, b.k, b.v, pool, slopes, meta, softmax_scale=1.0, **more)


def run(of: Any, b: Batch) -> Bound:
    """Decode or prefill, by the ``seg_la_fwd`` of a module."""
    return pooled(b, _forward(of, b))


def speculate(of: Any, b: Batch) -> Bound:
    """Drafts, equally many for each sequence, and the copy of the last one's state."""
    forward, slots = _forward(of, b), b.slots.long()
    rows = torch.arange(b.N, dtype=torch.int32, device=b.q.device)
    after = b.pool.new_empty(b.N, b.q.shape[0] // b.N, *b.pool.shape[1:])

    def call(pool: Tensor) -> Tensor:
        out: Tensor = forward(pool, caches=after, cache_indices=rows)
        pool.index_copy_(0, slots, after[:, -1])
        return out

    return pooled(b, call)


PEERS = (
    Peer("seg_la", "seg_la", "sglang", {
        DECODE: lambda b: run(sglang("seg_la.py"), b), PREFILL: lambda b: run(sglang("seg_la.py"), b),
        SPECULATE: lambda b: speculate(sglang("seg_la.py"), b),
    }),
)  # fmt: skip
