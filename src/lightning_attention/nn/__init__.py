"""Layers around the operation: those of published models with fixed decays, their parts, and the loss of a head."""

from lightning_attention.nn.lightning_attention import LightningAttention
from lightning_attention.nn.linear_cross_entropy import linear_cross_entropy
from lightning_attention.nn.lrpe import LRPE
from lightning_attention.nn.positions import token_positions
from lightning_attention.nn.rope import rope
from lightning_attention.nn.sglu import SGLU
from lightning_attention.nn.srmsnorm import SRMSNorm

__all__ = ["LRPE", "SGLU", "LightningAttention", "SRMSNorm", "linear_cross_entropy", "rope", "token_positions"]
