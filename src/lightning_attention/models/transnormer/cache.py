"""The cache of TransNormerLLM: one state per layer, of a size that does not depend on the context."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from lightning_attention.models.transnormer.configuration import TransnormerConfig
from lightning_attention.ops.fold import lightning_attention_fold
from lightning_attention.ops.recent import LONGEST, RecentTokens
from lightning_attention.ops.validation import integer

if TYPE_CHECKING:
    from lightning_attention.models.transnormer.mixer import TransnormerMixer


def _is_closed(x: Tensor | None) -> bool:
    """Whether it was made in inference mode and this is no such mode, in which nothing may write to it."""
    if x is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return x.is_inference()


class _RecurrentState(LinearAttentionLayer):
    """One layer's state, [N, H, D, E] float32 (float64 in a float64 model), and whether it holds anything yet."""

    # generate() would otherwise compile the decode step unasked, and ask for masks of kinds this model does not have.
    is_compileable = False

    recent: RecentTokens | None = None
    log_decay: Tensor | None = None

    @property
    def state(self) -> Tensor | None:
        """The state with what the ring of recent tokens holds."""
        if not self.has_previous_state[0]:
            return None
        if self.recent is not None:
            # No other mode may write to states that were made in inference mode.
            with torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode():
                lightning_attention_fold(self.recurrent_states[0], self.recent, self.log_decay)
        return self.recurrent_states[0]

    def with_ring(self, mixer: "TransnormerMixer", length: int) -> tuple[Tensor, RecentTokens | None]:
        """The state, and a ring beside it of so many tokens, for a step of one token a row."""
        state = self.recurrent_states[0]
        if length and self.recent is None:
            self.recent, self.log_decay = mixer.allocate_recent(len(state), length), mixer.log_decay
        return state, self.recent

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep ``recurrent_states``, at the address of the state before it where that can be."""
        held = self.recurrent_states[state_idx]
        # CUDA graphs and compiled decode steps want the address to stay; autograd wants the old values to stay.
        if (
            held is None
            or held.shape != recurrent_states.shape
            or recurrent_states.requires_grad
            or held.requires_grad
            or _is_closed(held)
        ):
            # Memory of its own: what a backend returns may be part of something larger.
            self.recurrent_states[state_idx] = held = recurrent_states.clone(memory_format=torch.contiguous_format)
            self.recent = None
        else:
            held.copy_(recurrent_states)
        self.device, self.dtype = held.device, held.dtype
        self.is_recurrent_states_initialized[state_idx] = True
        # transformers sets this from the convolution state alone, which this model does not have.
        self.has_previous_state[state_idx] = True
        return held

    def replace(self, state: Tensor) -> None:
        """Hold another batch: a state with other rows."""
        self.recurrent_states[0] = state
        self.recent = None

    @property
    def is_closed(self) -> bool:
        """Whether inference mode alone may write to the state or the ring."""
        return _is_closed(self.recurrent_states[0]) or (self.recent is not None and _is_closed(self.recent.k))

    def reset(self) -> None:
        held = self.recurrent_states[0]
        if held is not None and _is_closed(held):
            self.recurrent_states[0] = torch.zeros_like(held)
        super().reset()
        self.recent = None


class TransnormerCache(Cache):
    """Everything TransNormerLLM remembers of a batch: a state per layer and the next position of every sequence.

    Its size is layers · N · H · D · E float32 numbers (float64 in a float64 model), whatever the number of tokens read.
    Passing it to the model continues every sequence by any number of tokens; ``copy.deepcopy`` makes an independent
    copy. It cannot be cropped: a recurrent state does not say which token brought what.

    Args:
        config: the model's configuration.
        recent_tokens: how many tokens are kept in rings beside the states, so that a step of one token need not write
            these, from 1 to 64; 0: none. They help where a step waits for the GPU's memory: many rows, and
            no time lost on the host.

    Raises:
        TypeError, ValueError: ``recent_tokens`` is not an integer, or not from 0 to 64.

    Attributes:
        positions: [N] int64, the number of real tokens each sequence has read, which is the next token's position;
            None while the cache is empty. Padding is not counted.
    """

    layers: list[_RecurrentState]

    def __init__(self, config: TransnormerConfig, recent_tokens: int = 0) -> None:
        super().__init__(layers=[_RecurrentState() for _ in range(config.decoder_layers)])
        self.positions: Tensor | None = None
        self._columns = 0
        self._recent_tokens = integer("recent_tokens", recent_tokens, least=0, most=LONGEST)

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer, so that ``generate`` cuts off what was read, which 5.24 does not for linear layers."""
        return [False] * len(self.layers)

    def state(self, layer_idx: int) -> Tensor | None:
        """The state of one layer, [N, H, D, E], or None before the first token."""
        return self.layers[layer_idx].state

    def with_ring(self, layer_idx: int, mixer: "TransnormerMixer") -> tuple[Tensor, RecentTokens | None]:
        """One layer's state and ring of recent tokens, which a step of ``mixer`` updates; after the first token."""
        return self.layers[layer_idx].with_ring(mixer, self._recent_tokens)

    def leave_inference_mode(self) -> None:
        """Copy what was made in inference mode, which nothing else may write to, if a call is made outside of it."""
        # What one layer holds was made as that of the others; the positions may be older.
        if _is_closed(self.positions) or self.layers[0].is_closed:
            self._map_rows(Tensor.clone)

    def advance(self, columns: int, lengths: Tensor) -> None:
        """Count a forward pass over ``columns`` token columns, of which ``lengths``, [N], were real tokens."""
        self._columns += columns
        if self.positions is None:
            self.positions = lengths
        else:
            self.positions += lengths  # in place: a captured decode step counts on

    @property
    def batch_size(self) -> int:
        """N, or -1 while the cache is empty."""
        return -1 if self.positions is None else len(self.positions)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.positions is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (every layer has read the same)
        """Token columns read so far, padding included: what ``generate`` cuts from the front of its input."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """The length and offset of a mask over past and present."""
        return self._columns + query_length, 0

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        super().reset()
        self.positions = None
        self._columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in the given order."""
        self._map_rows(lambda rows: rows.index_select(0, indices.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies next to each other."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state cannot be rolled back.

        Raises:
            RuntimeError: always, unless there is nothing to remove.
        """
        if tokens_to_remove:
            raise RuntimeError(
                f"tokens_to_remove is {tokens_to_remove}; a recurrent state cannot give tokens back. "
                "Keep a copy.deepcopy of the cache from before them"
            )

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            if layer.state is not None:
                layer.replace(fn(layer.state))
        if self.positions is not None:
            self.positions = fn(self.positions)
