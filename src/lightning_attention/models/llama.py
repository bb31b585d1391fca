"""transformers' Llama as the commands train it: with PyTorch's softmax attention, and no mask where none is needed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: A name for ``attn_implementation``: "sdpa", for rows that are whole sequences or padded ones. A model without softmax
#: attention takes it and chooses nothing by it.
ATTENTION = "sdpa_of_whole_rows"


def _mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **how: Any) -> Tensor | None:
    """None where attention is causal and no more, so that PyTorch takes its fastest kernel.

    transformers' own leaves the mask out only where it can see that no row holds several documents. Under
    ``torch.compile`` it cannot look, and a mask of T² entries is made for every pass.
    """
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **how)


AttentionInterface.register(ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)
