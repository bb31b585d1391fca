"""The definition as a backend."""

from lightning_attention.kernels.backend import Backend
from lightning_attention.kernels.reference.attention import attention, attention_backward, states
from lightning_attention.kernels.reference.serving import commit, decode, prefill, verify

BACKEND = Backend(
    name="reference", attention=attention, attention_backward=attention_backward, states=states, decode=decode,
    prefill=prefill, verify=verify, commit=commit,
)  # fmt: skip
