"""The decode kernel of vLLM, in the copy that SGLang ships: vLLM's wheel is several hundred MB."""

from benchmarks.harness.pool import DECODE, Batch, Bound, pooled
from benchmarks.peers._sglang import sglang
from lightning_attention.bench.peers import Peer


def _decode(b: Batch) -> Bound:
    step = sglang("lightning_attn.py").linear_decode_forward_triton
    q, k, v = (x.unsqueeze(2) for x in (b.q, b.k, b.v))
    slopes = -b.log_decay
    return pooled(b, lambda pool: step(q, k, v, pool, slopes, b.slots))


PEERS = (Peer("vllm", "vLLM's kernel", "sglang", {DECODE: _decode}),)
