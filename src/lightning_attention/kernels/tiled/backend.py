"""The paper's tiling as a backend."""

from lightning_attention.kernels.backend import Backend
from lightning_attention.kernels.tiled.attention import attention, attention_backward
from lightning_attention.kernels.tiled.cross_entropy import cross_entropy
from lightning_attention.kernels.tiled.decode import decode
from lightning_attention.kernels.tiled.prefill import prefill
from lightning_attention.kernels.tiled.speculative import commit, verify
from lightning_attention.kernels.tiled.states import states

BACKEND = Backend(
    name="tiled", attention=attention, attention_backward=attention_backward, states=states, decode=decode,
    prefill=prefill, verify=verify, commit=commit, cross_entropy=cross_entropy,
)  # fmt: skip
