"""transformers' Llama as the commands train and serve it: no mask and no logits where none are needed, keys and values
in a pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.loss import OF_THE_LOSS, next_token_loss
from lightning_attention.nn.projection import is_plain

#: A name for ``attn_implementation``: "sdpa", for rows that are whole sequences or padded ones. A model without softmax
#: attention takes it and chooses nothing by it.
ATTENTION = "sdpa_of_whole_rows"


def _mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **how: Any) -> Tensor | None:
    """None where attention is just causal, so that PyTorch takes its fastest kernel.

    transformers' own leaves the mask out only where it can see that no row holds several documents. Under
    ``torch.compile`` it cannot look, and a mask of T² entries is made for every pass.
    """
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **how)


AttentionInterface.register(ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """transformers' own, under the same name in a saved folder; training makes no logits, as with TransNormerLLM."""

    def forward(self, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """As in transformers. With labels ``skip_logits`` leaves logits out; None: in training."""
        skip = self.training if skip_logits is None else skip_logits
        if not skip or kwargs.get("labels") is None or kwargs.get("logits_to_keep") or not is_plain(self.lm_head):
            return super().forward(*args, **kwargs)
        of_the_loss = {name: kwargs.pop(name) for name in ("labels", *OF_THE_LOSS) if name in kwargs}
        hidden = self.model(*args, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(loss=next_token_loss(hidden, self.lm_head.weight, **of_the_loss))


class ServedLlama:
    """A Llama with the members that :mod:`lightning_attention.serving` asks of a model.

    Args:
        model: a Llama with :data:`ATTENTION`, whose weights are used where they are.
        context_length: tokens that a sequence may have in all; memory for their keys and values is allocated at once.
    """

    def __init__(self, model: LlamaForCausalLM, context_length: int) -> None:
        self._model = model
        self.vocab_size = model.config.vocab_size
        self.context_length: int | None = context_length
        self.blocks = [_Block(layer, model.model.rotary_emb, context_length) for layer in model.model.layers]

    @property
    def embed(self) -> nn.Module:
        """Token ids [T] to [T, width]."""
        embedding: nn.Module = self._model.model.embed_tokens
        return embedding

    def head(self, hidden_states: Tensor) -> Tensor:
        """What the last block gave, [N, width], to logits [N, vocab_size]."""
        logits: Tensor = self._model.lm_head(self._model.model.norm(hidden_states))
        return logits

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters."""
        return self._model.parameters()

    def eval(self) -> ServedLlama:
        """Put the model into evaluation mode."""
        self._model.eval()
        return self


class _Rows(NamedTuple):
    """The rows of a pool that a call reads and writes, as the cache of one layer for transformers' attention."""

    pool: Tensor  # [2, rows, H, context_length, d]: keys, values
    slots: Tensor  # [N]
    positions: Tensor  # [N, T] of the tokens of this call
    end: int  # columns that anything of this call may look at

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [N, H, T, d] at their positions. Returns all that is there, [N, H, end, d]."""
        # The indices stand around a slice, so that their dimensions come first: [N, T, 2, H, d].
        new = torch.stack([keys, values]).permute(1, 3, 0, 2, 4)
        self.pool[:, self.slots[:, None], :, self.positions] = new.to(self.pool.dtype)
        held = self.pool[:, self.slots, :, : self.end]
        return held[0], held[1]


class _Block:
    """A layer of a Llama with a pool of keys and values; padding, slot −1, has a row of its own."""

    def __init__(self, layer: Any, rotary: nn.Module, context_length: int) -> None:
        self._layer, self._rotary, self._context_length = layer, rotary, context_length

    def allocate_state(self, rows: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 (of recurrent states)
        """Keys and values, [2, rows + 1, H, context_length, d], in the dtype of the weights."""
        attention = self._layer.self_attn
        weight: Tensor = attention.k_proj.weight
        size: int = attention.head_dim
        return weight.new_zeros(2, rows + 1, len(weight) // size, self._context_length, size)

    def step(self, x: Tensor, state: Tensor, *, positions: Tensor, slots: Tensor) -> Tensor:
        """Read one token of each sequence, [N, width]."""
        return self._read(x[:, None], _Rows(state, slots, positions[:, None], self._context_length))[:, 0]

    def prefill(
        self, x: Tensor, state: Tensor, *, cu_seqlens: Tensor, positions: Tensor, slots: Tensor, **_: Tensor
    ) -> Tensor:
        """Read the next tokens of N sequences, packed, [T, width], one sequence after another."""
        out, bounds = x.clone(), cu_seqlens.tolist()
        for sequence, (start, stop) in enumerate(pairwise(bounds)):
            own = positions[None, start:stop]
            rows = _Rows(state, slots[sequence, None], own, int(own[0, -1]) + 1)
            out[start:stop] = self._read(x[None, start:stop], rows)[0]
        return out

    def _read(self, x: Tensor, rows: _Rows) -> Tensor:
        """Tokens [N, T, width], each of which sees its sequence up to itself."""
        seen = torch.arange(rows.end, device=x.device) <= rows.positions[..., None]
        out: Tensor = self._layer(
            x,
            attention_mask=seen[:, None],
            position_embeddings=self._rotary(x, rows.positions),
            **{CACHE: rows},
        )
        return out
