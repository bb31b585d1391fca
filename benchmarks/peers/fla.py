"""flash-linear-attention: ``chunk_simple_gla`` over sequences, and ``fused_recurrent_simple_gla`` to decode.

It has no pool of states: dense ones come in and a new tensor leaves, and no gather or scatter is in the time.
"""

from importlib import import_module

import torch
from torch import Tensor

from benchmarks.harness.pool import DECODE, Batch, Bound
from lightning_attention.bench.peers import ATTENTION, PACKED_ATTENTION, Forward, Peer


def _attention(cu_seqlens: Tensor | None = None) -> Forward:
    chunk_simple_gla = import_module("fla.ops.simple_gla").chunk_simple_gla
    bounds = None if cu_seqlens is None else cu_seqlens.long()
    return lambda q, k, v, log_decay: chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0, cu_seqlens=bounds)[0]


def _decode(b: Batch) -> Bound:
    step = import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
    q, k, v = (x.unsqueeze(1) for x in (b.q, b.k, b.v))
    initial, finals = b.initial(), [b.q.new_empty(0)]

    def call() -> Tensor:
        out: Tensor
        out, finals[0] = step(q, k, v, g_gamma=b.log_decay, scale=1.0, initial_state=initial, output_final_state=True)
        return out

    return Bound(call, lambda: finals[0])


# Its final state is float32 whatever the initial one is.
PEERS = (
    Peer("fla", "flash-linear-attention", "flash-linear-attention",
         {ATTENTION: _attention, PACKED_ATTENTION: _attention, DECODE: _decode}, states=(torch.float32,)),
)  # fmt: skip
