"""Ours by the signatures of SGLang and vLLM: what their own functions are held against, wrapping included."""

from functools import partial
from types import SimpleNamespace

from benchmarks.harness.pool import DECODE, EAGER, PREFILL, SPECULATE
from benchmarks.peers import seg_la, vllm_layer
from lightning_attention.bench.peers import Peer
from lightning_attention.integrations import sglang, vllm

_SGLANG = SimpleNamespace(SegLaMeta=partial(SimpleNamespace, mask=None), seg_la_fwd=sglang.seg_la_fwd)
_VLLM = SimpleNamespace(
    MiniMaxText01LinearKernel=None, linear_attention_decode=vllm.linear_attention_decode,
    linear_attention_prefill_and_mix=vllm.linear_attention_prefill_and_mix,
    clear_linear_attention_cache_for_new_sequences=vllm.clear_linear_attention_cache_for_new_sequences,
    bailing_linear_attention_decode_spec=vllm.bailing_linear_attention_decode_spec,
)  # fmt: skip

PEERS = (
    Peer("as_sglang", "ours as SGLang's", "lightning-attention", {
        DECODE: partial(seg_la.run, _SGLANG), PREFILL: partial(seg_la.run, _SGLANG),
        SPECULATE: partial(seg_la.speculate, _SGLANG),
    }, against="seg_la"),
    Peer("as_vllm", "ours as vLLM's", "lightning-attention", {
        DECODE: partial(vllm_layer.decode, _VLLM), PREFILL: partial(vllm_layer.prefill, _VLLM),
        EAGER: partial(vllm_layer.prefill, _VLLM), SPECULATE: partial(vllm_layer.speculate, _VLLM),
    }, against="vllm_layer"),
)  # fmt: skip
