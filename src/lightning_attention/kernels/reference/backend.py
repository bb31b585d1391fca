"""The definition as a backend."""

import torch

from lightning_attention.kernels.backend import Backend
from lightning_attention.kernels.quantized import dequantize, quantize
from lightning_attention.kernels.recent import OverRings
from lightning_attention.kernels.reference.attention import attention, attention_backward, states
from lightning_attention.kernels.reference.serving import commit, decode, prefill, verify

_over_rings = OverRings(decode, prefill, verify, lambda x: torch.float64)  # noqa: ARG005

BACKEND = Backend(
    name="reference", attention=attention, attention_backward=attention_backward, states=states, decode=decode,
    prefill=prefill, verify=verify, commit=commit, decode_recent=_over_rings.decode, prefill_recent=_over_rings.prefill,
    verify_recent=_over_rings.verify, commit_recent=_over_rings.commit, fold=_over_rings.fold,
    dequantize=dequantize, quantize=quantize,
)  # fmt: skip
