"""Layers around the operation, in plain PyTorch: those of published models with fixed decays, and their parts."""

from lightning_attention.nn.lightning_attention import LightningAttention
from lightning_attention.nn.lrpe import LRPE
from lightning_attention.nn.positions import token_positions
from lightning_attention.nn.rope import rope
from lightning_attention.nn.sglu import SGLU
from lightning_attention.nn.srmsnorm import SRMSNorm

__all__ = ["LRPE", "SGLU", "LightningAttention", "SRMSNorm", "rope", "token_positions"]
