"""TransNormerLLM as transformers classes; importing this package makes transformers know the model."""

from lightning_attention.models.transnormer.cache import TransnormerCache
from lightning_attention.models.transnormer.configuration import TransnormerConfig
from lightning_attention.models.transnormer.modeling import (
    TransnormerForCausalLM,
    TransnormerModel,
    TransnormerPreTrainedModel,
)
from lightning_attention.models.transnormer.registration import register

register()

__all__ = [
    "TransnormerCache",
    "TransnormerConfig",
    "TransnormerForCausalLM",
    "TransnormerModel",
    "TransnormerPreTrainedModel",
]
