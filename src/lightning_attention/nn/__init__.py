"""Layers around the operation, in plain PyTorch: TransNormerLLM's, and those of other models with fixed decays."""

from lightning_attention.nn.gated_linear_attention import GatedLinearAttention
from lightning_attention.nn.lightning_attention import LightningAttention
from lightning_attention.nn.lrpe import LRPE
from lightning_attention.nn.rope import rope
from lightning_attention.nn.sglu import SGLU
from lightning_attention.nn.srmsnorm import SRMSNorm

__all__ = ["LRPE", "SGLU", "GatedLinearAttention", "LightningAttention", "SRMSNorm", "rope"]
