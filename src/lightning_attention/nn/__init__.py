"""Layers around the operation, in plain PyTorch: what a TransNormerLLM block is made of."""

from lightning_attention.nn.gated_linear_attention import GatedLinearAttention
from lightning_attention.nn.lrpe import LRPE
from lightning_attention.nn.sglu import SGLU
from lightning_attention.nn.srmsnorm import SRMSNorm

__all__ = ["LRPE", "SGLU", "GatedLinearAttention", "SRMSNorm"]
