"""Text from a model for many requests at once; no model is known here, only the protocol that one has to follow."""

from lightning_attention.serving.engine import ContinuousBatch, Token
from lightning_attention.serving.model import DecoderBlock, DecoderModel
from lightning_attention.serving.request import Request

__all__ = ["ContinuousBatch", "DecoderBlock", "DecoderModel", "Request", "Token"]
