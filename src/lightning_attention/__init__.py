"""Linear attention that trains and serves at constant speed per token."""

from lightning_attention import decay
from lightning_attention.kernels.backend import INVARIANT_CHUNK
from lightning_attention.ops import trees
from lightning_attention.ops.attention import LightningOutput, lightning_attention
from lightning_attention.ops.decode import lightning_attention_decode
from lightning_attention.ops.fold import lightning_attention_fold
from lightning_attention.ops.prefill import lightning_attention_prefill
from lightning_attention.ops.quantized import QuantizedStates
from lightning_attention.ops.recent import RecentTokens
from lightning_attention.ops.speculative import lightning_attention_commit, lightning_attention_verify

__version__ = "0.1.0"

__all__ = [
    "INVARIANT_CHUNK",
    "LightningOutput",
    "QuantizedStates",
    "RecentTokens",
    "decay",
    "lightning_attention",
    "lightning_attention_commit",
    "lightning_attention_decode",
    "lightning_attention_fold",
    "lightning_attention_prefill",
    "lightning_attention_verify",
    "trees",
]
