"""The paper's tiling as a backend."""

from lightning_attention.kernels.backend import Backend
from lightning_attention.kernels.pool import accumulator
from lightning_attention.kernels.quantized import dequantize, quantize
from lightning_attention.kernels.recent import OverRings
from lightning_attention.kernels.tiled.attention import attention, attention_backward
from lightning_attention.kernels.tiled.cross_entropy import cross_entropy
from lightning_attention.kernels.tiled.decode import decode
from lightning_attention.kernels.tiled.prefill import prefill
from lightning_attention.kernels.tiled.speculative import commit, verify
from lightning_attention.kernels.tiled.states import states

_over_rings = OverRings(decode, prefill, verify, accumulator)

BACKEND = Backend(
    name="tiled", attention=attention, attention_backward=attention_backward, states=states, decode=decode,
    prefill=prefill, verify=verify, commit=commit, decode_recent=_over_rings.decode, prefill_recent=_over_rings.prefill,
    verify_recent=_over_rings.verify, commit_recent=_over_rings.commit, fold=_over_rings.fold,
    dequantize=dequantize, quantize=quantize,
    cross_entropy=cross_entropy,
)  # fmt: skip
