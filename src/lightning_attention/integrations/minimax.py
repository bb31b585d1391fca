"""Transformers' MiniMax (Text-01, M1) with this project's attention in its linear layers.

    from lightning_attention.integrations.minimax import apply_lightning_attention
    apply_lightning_attention(model)

Only the given model changes: the class of its ``MiniMaxLightningAttention`` modules, hence their forward pass.
Parameters, buffers and their names stay as they are. docs/integrations.md says what equals the original and what does
not.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import (
    MiniMaxCache,
    MiniMaxLightningAttention,
    MiniMaxRMSNorm,
    apply_mask_to_padding_states,
)

from lightning_attention.models.arguments import check_keywords, given_cache
from lightning_attention.ops.attention import lightning_attention
from lightning_attention.ops.decode import lightning_attention_decode
from lightning_attention.ops.fold import lightning_attention_fold
from lightning_attention.ops.recent import LONGEST, RecentTokens
from lightning_attention.ops.validation import STATES, integer


def apply_lightning_attention(model: nn.Module, *, state_dtype: torch.dtype = torch.float32) -> None:
    """Compute the linear layers of a MiniMax model with ``lightning_attention``; in place, that model only.

    Args:
        model: a model of transformers' models/minimax, or anything that contains its ``MiniMaxLightningAttention``.
        state_dtype: dtype in which the cache keeps the states, [B, H, D, E] a layer: float32, bfloat16 or float16.
            float32 is what the states are summed in. In 16 bits they take half the memory and every call rounds them,
            as the original module does in a model of that dtype, and only then can that module go on with them. A
            float64 model keeps float64.

    Raises:
        TypeError: ``state_dtype`` is none of those.
        ValueError: there is no such module, or one has a class or a forward pass that is not transformers' own.
    """
    if state_dtype not in STATES:
        raise TypeError(f"state_dtype is {state_dtype}; it must be {' or '.join(map(str, STATES))}")
    found = [m for m in model.modules() if isinstance(m, MiniMaxLightningAttention)]
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without a MiniMaxLightningAttention")
    for module in found:
        _check_own(module, (MiniMaxLightningAttention, LightningMiniMaxAttention))
    for module in found:
        _change_class(module, LightningMiniMaxAttention)
        module.state_dtype = state_dtype
        if _is_own(module.norm, (MiniMaxRMSNorm,)):
            _change_class(module.norm, FusedMiniMaxRMSNorm)


def remove_lightning_attention(model: nn.Module) -> None:
    """Undo :func:`apply_lightning_attention`. What is not changed stays as it is.

    Raises:
        ValueError: a changed module has got another forward pass since.
    """
    found = [m for m in model.modules() if isinstance(m, LightningMiniMaxAttention)]
    for module in found:
        _check_own(module, (LightningMiniMaxAttention,))
    for module in found:
        _change_class(module, MiniMaxLightningAttention)
        del module.state_dtype
        if isinstance(module.norm, FusedMiniMaxRMSNorm):
            _change_class(module.norm, MiniMaxRMSNorm)


class LightningMiniMaxAttention(MiniMaxLightningAttention):
    """``MiniMaxLightningAttention`` with the same parameters, buffers, arguments and results, computed in blocks.

    Not constructed but assigned: :func:`apply_lightning_attention` makes it the class of modules that exist.
    """

    state_dtype: torch.dtype

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,  # noqa: ARG002 (these layers have no rope)
        attention_mask: Tensor | None,
        past_key_values: MiniMaxCache | None = None,
        *,
        cache: MiniMaxCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Mix any number of tokens, from the cache's state where it has one.

        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: ignored.
            attention_mask: [B, T], 0 at padding, whose q, k and v are then zero; None for none. The state decays over
                padding as over any token.
            past_key_values: the name of ``cache`` before transformers 5.24; either is taken.
            cache: the cache; this layer's state in it, [B, H, D, E], is replaced, or updated in place where T is 1 and
                nothing requires a gradient.
            **kwargs: what the model hands to every kind of layer and changes nothing in this one, by name.

        Returns:
            The output, [B, T, hidden_size], and the state after it; of a module without forward hooks it lacks what the
            cache has in rings.

        Raises:
            TypeError: ``cache`` is another kind of cache, or a keyword is not known. Boundaries of packed documents
                (``cu_seq_lens_q``) are such: these layers would read on across them.
        """
        check_keywords(self, kwargs, ("position_ids", "use_cache"))
        cache = given_cache(MiniMaxCache, cache, past_key_values)
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        qkv = apply_mask_to_padding_states(qkv, attention_mask)
        # Per head q, k and v lie side by side: three strided views, no copies.
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim)).split(self.head_dim, -1)
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        log_decay = -self.slope_rate.flatten().to(exact)

        held = None if cache is None else _state(cache, self.layer_idx)
        if cache is not None and held is not None and q.shape[1] == 1 and _can_update(held, q):
            state, (q, k, v) = held, (x[:, 0] for x in (q, k, v))
            recent = cache.ring(self.layer_idx, k, log_decay) if isinstance(cache, LightningMiniMaxCache) else None
            mixed = lightning_attention_decode(q, k, v, log_decay, state, recent=recent)
            # A hook that keeps what a module returns (output_attentions) must not see it change at the next token.
            if self._forward_hooks:
                state = cache.get_linear_cache(self.layer_idx).clone()
        else:
            initial = None if cache is None or held is None else cache.get_linear_cache(self.layer_idx).to(exact)
            mixed, final = lightning_attention(q, k, v, log_decay, initial_state=initial, output_final_state=True)
            assert final is not None
            state = final.to(self.state_dtype) if exact == torch.float32 else final
            if cache is not None:
                cache.set_linear_cache(self.layer_idx, state)
        mixed = self.norm(mixed.reshape(*hidden_states.shape[:-1], -1))
        return self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * mixed), state


class FusedMiniMaxRMSNorm(MiniMaxRMSNorm):
    """``MiniMaxRMSNorm`` in one kernel: at 32,768 tokens of 8,192 channels, 1 GB to move in place of 9."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm of [..., channels] over the last dimension, rounded once in place of twice."""
        if hidden_states.dtype != self.weight.dtype:  # autocast, whose result has the weight's dtype
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class LightningMiniMaxCache(MiniMaxCache):
    """``MiniMaxCache`` that knows its length and its states, whatever kind of layer comes first.

    The original asks layer 0 for the length, and an empty softmax layer stands in for every linear one: with a linear
    layer first, as published, it counts no tokens, so that several tokens at once get the mask and the positions of a
    first chunk. It also leaves the states where they are when beams are reordered and when it is reset.

    Args:
        recent_tokens: how many tokens are kept in rings beside the states, so that a step of one token need not write
            these, from 1 to 64; 0: none. They are worth having where a step waits for the GPU's memory: many rows, and
            no time lost on the host. A state in ``linear_cache`` then lacks what its ring holds;
            :meth:`get_linear_cache` makes it whole.

    Raises:
        TypeError, ValueError: ``recent_tokens`` is no integer, or not from 0 to 64.
    """

    linear_cache: list[Any]  # a state, or [] where the layer is a softmax one

    # On the class, for a cache that was made as transformers' own and knows of no rings.
    _recent_tokens = 0
    _rings: Mapping[int, tuple[RecentTokens, Tensor]] = MappingProxyType({})  # by layer, with its log_decay

    def __init__(self, recent_tokens: int = 0) -> None:
        super().__init__()
        self._recent_tokens = integer("recent_tokens", recent_tokens, least=0, most=LONGEST)

    def ring(self, layer_idx: int, k: Tensor, log_decay: Tensor) -> RecentTokens | None:
        """A layer's ring, empty at first, for a step with these k [B, H, D]; None where there are none."""
        if self._recent_tokens and layer_idx not in self._rings:
            B, H, D, E = self.linear_cache[layer_idx].shape
            ring = RecentTokens.empty(B, H, D, E, self._recent_tokens, k.dtype, k.device)
            self._rings = {**self._rings, layer_idx: (ring, log_decay)}
        return self._rings[layer_idx][0] if layer_idx in self._rings else None

    def get_linear_cache(self, layer_idx: int) -> Any:
        """A layer's state, [B, H, D, E], with what its ring holds; [] of a softmax layer, None past the last."""
        if layer_idx in self._rings:
            # No other mode may write to states that were made in inference mode.
            with torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode():
                lightning_attention_fold(self.linear_cache[layer_idx], *self._rings[layer_idx])
        return super().get_linear_cache(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Keep a layer's state, which is whole."""
        super().set_linear_cache(layer_idx, linear_cache)
        self._rings = {layer: ring for layer, ring in self._rings.items() if layer != layer_idx}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, 0 where no layer counts them."""
        return super().get_seq_length(self._counting_layer(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The length and offset of a mask over past and present."""
        return super().get_mask_sizes(query_length, self._counting_layer(layer_idx))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._map_states(torch.zeros_like)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was (beam search)."""
        super().reorder_cache(beam_idx)
        self._map_states(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in the given order."""
        super(MiniMaxCache, self).batch_select_indices(indices)
        self._map_states(lambda state: state[indices.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies next to each other."""
        super(MiniMaxCache, self).batch_repeat_interleave(repeats)
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def _counting_layer(self, layer_idx: int) -> int:
        if layer_idx < len(self.layers) and self.layers[layer_idx].is_initialized:
            return layer_idx
        return next((i for i, layer in enumerate(self.layers) if layer.is_initialized), layer_idx)

    def _map_states(self, fn: Callable[[Tensor], Tensor]) -> None:
        states = [self.get_linear_cache(layer_idx) for layer_idx in range(len(self.linear_cache))]
        self.linear_cache = [fn(state) if isinstance(state, Tensor) else state for state in states]
        self._rings = {}


def _state(cache: MiniMaxCache, layer_idx: int) -> Tensor | None:
    """The layer's state, [B, H, D, E], as it is beside its ring, or None before its first token.

    The cache becomes one of ours.
    """
    # The compiler refuses the change of a class: a compiled model wants a LightningMiniMaxCache from the start.
    if type(cache) is MiniMaxCache and not torch.compiler.is_compiling():
        cache.__class__ = LightningMiniMaxCache
    held = cache.linear_cache[layer_idx] if layer_idx < len(cache.linear_cache) else None
    return held if isinstance(held, Tensor) else None


def _can_update(state: Tensor, q: Tensor) -> bool:
    """Whether the state may be updated in place: not where autograd still needs it, or inference mode made it."""
    if torch.is_grad_enabled() and (q.requires_grad or state.requires_grad):
        return False
    if not torch.compiler.is_compiling() and state.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return state.dtype in STATES and q.dtype != torch.float64


def _is_own(module: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether the module is of one of these very classes, and runs its class's forward pass, hooked or not."""
    forward = _held_forward(module)
    return type(module) in classes and (forward is None or getattr(forward, "__func__", None) is type(module).forward)


def _check_own(module: nn.Module, classes: tuple[type, ...]) -> None:
    if not _is_own(module, classes):
        raise ValueError(
            f"model contains a {type(module).__name__} with a forward pass that is not transformers' own; apply "
            "lightning attention before whatever wraps or replaces it, and remove it after"
        )


def _held_forward(module: nn.Module) -> Any:
    """The forward pass stored on the instance, as accelerate's hooks (device_map) leave it, or None."""
    return vars(module).get("_old_forward", vars(module).get("forward"))


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if _held_forward(module) is not None:
        setattr(
            module, "_old_forward" if "_old_forward" in vars(module) else "forward", MethodType(cls.forward, module)
        )
    module.__class__ = cls
