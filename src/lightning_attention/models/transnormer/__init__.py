"""TransNormerLLM as transformers classes; importing this package makes the Auto classes know the model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lightning_attention.models.transnormer.cache import TransnormerCache
from lightning_attention.models.transnormer.configuration_transnormer import TransnormerConfig
from lightning_attention.models.transnormer.modeling_transnormer import (
    TransnormerForCausalLM,
    TransnormerModel,
    TransnormerPreTrainedModel,
)

AutoConfig.register("transnormer", TransnormerConfig, exist_ok=True)
AutoModel.register(TransnormerConfig, TransnormerModel, exist_ok=True)
AutoModelForCausalLM.register(TransnormerConfig, TransnormerForCausalLM, exist_ok=True)

__all__ = [
    "TransnormerCache",
    "TransnormerConfig",
    "TransnormerForCausalLM",
    "TransnormerModel",
    "TransnormerPreTrainedModel",
]
