"""Time and memory per token against T, as `lightning-attention bench` measures it, with more peers."""

from lightning_attention.bench import lengths

CASE = lengths.CASE
