"""What vLLM's layers of MiniMax and Bailing call, from its own files; q, k and v are float32, as the layers make them.

A prefill is a loop over prompts in Python that reads on the host where each begins and which row it has: vLLM never
captures it. Called eagerly it finds both on the device, as in vLLM; so that it can be captured in a CUDA graph all the
same, and its kernels be timed alone, it finds them on the host there.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.pool import DECODE, EAGER, PREFILL, SPECULATE, Batch, Bound, pooled
from benchmarks.peers._vllm import vllm
from lightning_attention import lightning_attention
from lightning_attention.bench.peers import Peer

BLOCK = 256  # tokens that its prefill reads at once


def decode(of: Any, batch: Batch) -> Bound:
    """One token of each sequence, by the functions ``of`` a layer's module."""
    b = _as_made(batch)
    slopes = -b.log_decay
    return pooled(b, lambda pool: of.linear_attention_decode(b.q, b.k, b.v, pool, slopes, b.slots))


def prefill(of: Any, batch: Batch, device: torch.device | None = None) -> Bound:
    """Single tokens that come first decode, the others are prompts and chunks; metadata on the device, or another."""
    b, decodes = _as_made(batch), _decodes(batch)
    slopes, device = -b.log_decay, device or b.q.device
    bounds, dense = b.cu_seqlens.to(device), b.slots
    meta = SimpleNamespace(
        num_prefills=b.N - decodes, num_prefill_tokens=b.q.shape[0] - decodes, num_decodes=decodes,
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
            b.q, b.k, b.v, pool, slots, meta, slopes, BLOCK, of_decodes, prefix
        )
        return found

    return pooled(b, run)


def speculate(of: Any, batch: Batch) -> Bound:
    """Drafts, equally many for each sequence, of which each has a row of the pool; the last is the state."""
    b, P = _as_made(batch), batch.q.shape[0] // batch.N
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


def _as_made(b: Batch) -> Batch:
    return replace(b, q=b.q.float(), k=b.k.float(), v=b.v.float())


def _decodes(b: Batch) -> int:
    """How many single tokens come before the first prompt or chunk."""
    lengths = b.cu_seqlens.diff().tolist()
    return 0 if b.fresh else next((n for n, length in enumerate(lengths) if length > 1), len(lengths))


def _theirs(b: Batch, right: Tensor, heads: list[int]) -> Tensor:
    """The output of its prefill: what is older than a block of a prompt is weighed by a decay too few, λ⁻¹ too much.

    See docs/engines.md.
    """
    cuts = [t for start, end in pairwise(b.cu_seqlens.tolist()) for t in range(start, end, BLOCK)]
    blocks = torch.tensor([*cuts, b.q.shape[0]], dtype=torch.int32, device=b.q.device)
    q, k, v = (x[None, :, heads].double() for x in (b.q, b.k, b.v))
    log_decay = b.log_decay[heads]
    older = right - lightning_attention(q, k, v, log_decay, cu_seqlens=blocks, backend="tiled").output[0]
    older[: _decodes(b)] = 0
    return right + torch.expm1(-log_decay.double())[:, None] * older


def _prefill(b: Batch, device: torch.device | None) -> Bound:
    return prefill(_layers(), b, device)._replace(known=partial(_theirs, b))


def _layers() -> SimpleNamespace:
    theirs = vllm()
    return SimpleNamespace(**vars(theirs.minimax) | vars(theirs.bailing))


PEERS = (
    Peer("vllm_layer", "vLLM's layer", "vllm", {
        DECODE: lambda b: decode(_layers(), b),
        PREFILL: lambda b: _prefill(b, torch.device("cpu")),
        EAGER: lambda b: _prefill(b, None),
        SPECULATE: lambda b: speculate(_layers(), b),
    }),
)  # fmt: skip
