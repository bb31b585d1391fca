"""What vLLM's layers of MiniMax and Bailing call, from its own files.

A prefill is a loop over prompts in Python that reads on the host where each begins and which row it has. Here it finds
both there already, so that it can be captured in a CUDA graph; in vLLM they are on the device. It weighs what is older
than a block by a decay too few (docs/engines.md), so its numbers are not compared.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.pool import DECODE, PREFILL, SPECULATE, Batch, Bound, pooled
from benchmarks.peers._vllm import vllm
from lightning_attention.bench.peers import Peer


def decode(of: Any, b: Batch) -> Bound:
    """One token of each sequence, by the functions ``of`` a layer's module."""
    slopes = -b.log_decay
    return pooled(b, lambda pool: of.linear_attention_decode(b.q, b.k, b.v, pool, slopes, b.slots))


def prefill(of: Any, b: Batch, device: torch.device | None = None) -> Bound:
    """Single tokens that come first decode, the others are prompts and chunks; metadata on the device, or another."""
    slopes, device = -b.log_decay, device or b.q.device
    lengths = b.cu_seqlens.diff().tolist()
    decodes = next((n for n, length in enumerate(lengths) if length > 1), len(lengths)) if not b.fresh else 0
    bounds, dense = b.cu_seqlens.to(device), b.slots
    meta = SimpleNamespace(
        num_prefills=b.N - decodes, num_prefill_tokens=sum(lengths[decodes:]), num_decodes=decodes,
        num_decode_tokens=decodes, query_start_loc=bounds, seq_lens=bounds.diff() + (0 if b.fresh else 1),
        state_indices_tensor=b.slots.to(device), state_indices_tensor_p=b.slots.to(device)[decodes:],
    )  # fmt: skip
    prefix = None if of.MiniMaxText01LinearKernel is None else of.MiniMaxText01LinearKernel.jit_linear_forward_prefix

    def of_decodes(q: Tensor, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, meta: Any) -> Tensor:  # noqa: ARG001
        found: Tensor = of.linear_attention_decode(q, k, v, pool, slopes, dense, 0, decodes, 0, decodes)
        return found

    def run(pool: Tensor) -> Tensor:
        slots = meta.state_indices_tensor
        of.clear_linear_attention_cache_for_new_sequences(pool, slots, meta)
        found: Tensor = of.linear_attention_prefill_and_mix(
            b.q, b.k, b.v, pool, slots, meta, slopes, 256, of_decodes, prefix
        )
        return found

    return pooled(b, run)


def speculate(of: Any, b: Batch) -> Bound:
    """Drafts, equally many for each sequence, of which each has a row of the pool; the last is the state."""
    P = b.q.shape[0] // b.N
    more = torch.arange(b.N, b.N * P, dtype=torch.int32, device=b.q.device).view(b.N, P - 1)
    rows = torch.cat([b.slots[:, None], more], 1)
    accepted = torch.ones_like(b.slots)  # of the drafts before: the state is in each sequence's first row
    pool = torch.cat([b.pool, b.pool.new_zeros(b.N * (P - 1), *b.pool.shape[1:])])
    slopes = -b.log_decay

    def call() -> Tensor:
        found: Tensor = of.bailing_linear_attention_decode_spec(
            b.q, b.k, b.v, pool, slopes, rows, b.cu_seqlens, accepted, 0, None, 0, None, 32
        )
        return found

    return Bound(call, lambda: pool[rows[:, -1].long()])


def _unchecked(b: Batch) -> Bound:
    call, _ = prefill(_layers(), b, torch.device("cpu"))
    return Bound(call, lambda: None)


def _layers() -> SimpleNamespace:
    theirs = vllm()
    return SimpleNamespace(**vars(theirs.minimax) | vars(theirs.bailing))


PEERS = (
    Peer("vllm_layer", "vLLM's layer", "vllm", {
        DECODE: lambda b: decode(_layers(), b),
        PREFILL: _unchecked,
        SPECULATE: lambda b: speculate(_layers(), b),
    }),
)  # fmt: skip
