"""The model that a configuration asks for."""

from __future__ import annotations

from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.tokenizer import END_ID, PAD_ID


def new_model(
    config: TrainConfig, vocab_size: int, end_id: int = END_ID, pad_id: int | None = PAD_ID
) -> TransnormerForCausalLM:
    """A model with fresh weights from torch's current random state, in float32.

    `end_id` is the token that ends a text and `pad_id` the one that pads a batch, whose embedding stays zero.
    """
    return TransnormerForCausalLM(
        TransnormerConfig(
            vocab_size=vocab_size,
            decoder_embed_dim=config.width,
            decoder_layers=config.layers,
            decoder_attention_heads=config.heads,
            glu_dim=config.glu_dim or default_glu_dim(config.width),
            pad_token_id=pad_id,
            bos_token_id=end_id,
            eos_token_id=end_id,
            tie_word_embeddings=config.tie_embeddings,
        )
    )


def default_glu_dim(width: int) -> int:
    """2.75 widths, as in the released 385M and 1B, to a multiple of 32."""
    return 32 * round(2.75 * width / 32) or 32
