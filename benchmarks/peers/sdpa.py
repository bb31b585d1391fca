"""PyTorch's softmax attention."""

from lightning_attention.bench.peers import SDPA

PEERS = SDPA
