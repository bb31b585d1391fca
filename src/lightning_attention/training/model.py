"""The model that a configuration asks for."""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_attention.models.llama import ATTENTION
from lightning_attention.models.presets import Size, classes, default_glu_dim, find_size
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.tokenizer import END_ID, PAD_ID


def new_model(
    config: TrainConfig, vocab_size: int, end_id: int = END_ID, pad_id: int | None = PAD_ID
) -> PreTrainedModel:
    """A model with fresh weights from torch's current random state, in float32.

    `end_id` is the token that ends a text and `pad_id` the one that pads a batch, whose embedding stays zero.
    """
    kind, model = classes(config.model)
    special: dict[str, int | None] = {"pad_token_id": pad_id, "bos_token_id": end_id, "eos_token_id": end_id}
    attention = ATTENTION
    if config.model == "llama":
        special["max_position_embeddings"] = config.seq_len  # a note: rotary positions have no end
        if config.documents == "separate":
            attention = "sdpa"  # transformers' own, with a mask where positions begin anew
    about = kind(**size_of(config).fields(config.model), vocab_size=vocab_size, **special)
    made: PreTrainedModel = model._from_config(about, attn_implementation=attention)
    return made


def size_of(config: TrainConfig) -> Size:
    """The size that a configuration names, or spells out."""
    if config.size is not None:  # which nothing beside it may contradict
        return find_size(config.size)
    ours, theirs = (config.glu_dim or default_glu_dim(config.width, model) for model in ("transnormer", "llama"))
    return Size(config.layers, config.width, config.heads, ours, theirs, tie_embeddings=config.tie_embeddings)
