"""The model that a configuration asks for."""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_attention.models.llama import ATTENTION
from lightning_attention.models.presets import Size, classes, default_glu_dim, find_size
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.tokenizer import END_ID, PAD_ID


def new_model(config: TrainConfig, vocab_size: int) -> PreTrainedModel:
    """A model with fresh weights from torch's current random state, in float32."""
    kind, model = classes(config.model)
    special = {"pad_token_id": PAD_ID, "bos_token_id": END_ID, "eos_token_id": END_ID}
    if config.model == "llama":
        special["max_position_embeddings"] = config.seq_len  # a note: rotary positions have no end
    about = kind(**size_of(config).fields(config.model), vocab_size=vocab_size, **special)
    made: PreTrainedModel = model._from_config(about, attn_implementation=ATTENTION)
    return made


def size_of(config: TrainConfig) -> Size:
    """The size that a configuration names, or spells out."""
    if config.size is not None:  # which nothing beside it may contradict
        return find_size(config.size)
    ours, theirs = (config.glu_dim or default_glu_dim(config.width, model) for model in ("transnormer", "llama"))
    return Size(config.layers, config.width, config.heads, ours, theirs, tie_embeddings=config.tie_embeddings)
