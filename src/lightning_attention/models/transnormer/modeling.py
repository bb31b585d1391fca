"""TransNormerLLM (arXiv 2307.14995, 2405.17381) with the state-dict names of the released checkpoints."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from lightning_attention.models.arguments import CACHE, check_keywords, given_cache
from lightning_attention.models.loss import OF_THE_LOSS, next_token_loss
from lightning_attention.models.transnormer.block import TransnormerDecoderLayer, TransnormerEmbedding
from lightning_attention.models.transnormer.cache import TransnormerCache
from lightning_attention.models.transnormer.configuration import TransnormerConfig
from lightning_attention.models.transnormer.mixer import TransnormerMixer
from lightning_attention.models.transnormer.packing import (
    documents,
    learnable,
    local_mask,
    may_restart,
    one_of,
    pack_batch,
)
from lightning_attention.models.transnormer.slices import loss_of_slices, pack_slices
from lightning_attention.nn import LRPE, SRMSNorm
from lightning_attention.nn.projection import is_plain
from lightning_attention.nn.sharded import laid_out_like

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What else the collators that pack documents hand over; it repeats the boundaries, so it never comes alone.
_COMPANIONS = ("cu_seq_lens_k", "seq_idx")


class TransnormerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every class of this model."""

    config: TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransnormerDecoderLayer"]  # noqa: RUF012 (transformers reads plain lists)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _is_stateful = True

    def _check_and_adjust_attn_implementation(self, *_: Any, **__: Any) -> str:
        """Whichever ``attn_implementation`` is asked for: there is no softmax attention to choose one for."""
        return "eager"

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing for the classes of this package, which a saved folder points at; a subclass elsewhere is copied.

        transformers calls this where a folder is loaded with ``trust_remote_code``, and what is registered copies its
        source into every folder it is saved to.
        """
        if cls.__module__ != __name__:
            super().register_for_auto_class(auto_class)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, init_std) for matrices, zero for the padding row; frequencies and decays by their formulas."""
        super()._init_weights(module)
        if isinstance(module, TransnormerEmbedding):
            if module.padding_idx is not None and hasattr(module.weight, "device_mesh"):
                # transformers has set the padding row to zero in a copy, where the matrix is sharded.
                kept = torch.arange(module.num_embeddings, device=module.weight.device) != module.padding_idx
                kept = laid_out_like(kept[:, None].expand(-1, module.embedding_dim), module.weight)
                init.copy_(module.weight, module.weight * kept)
        elif isinstance(module, LRPE):
            init.copy_(module.theta, module.initial_theta())
        elif isinstance(module, TransnormerMixer):
            # In no checkpoint, and empty after loading by way of the meta device.
            module.reset_buffers()


class TransnormerModel(TransnormerPreTrainedModel):
    """The blocks, from token ids to the last hidden states.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(config)
        scale = 1.0 if config.no_scale_embedding else math.sqrt(config.decoder_embed_dim)
        self.embed_tokens = TransnormerEmbedding(
            config.vocab_size, config.decoder_embed_dim, config.pad_token_id, scale
        )
        self.layers = nn.ModuleList([TransnormerDecoderLayer(config, i) for i in range(config.decoder_layers)])
        self.norm = SRMSNorm()
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: TransnormerCache | None = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None, output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, cache: TransnormerCache | None = None,
        group: "ProcessGroup | None" = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Read a batch, from nothing or from where a cache stands.

        Args:
            input_ids: [B, T] token ids; or give ``inputs_embeds``.
            attention_mask: [B, S] with S ≥ T, zero where a token is padding; the last T columns are this call's.
                Padding may be anywhere, in a continuation too: it changes no state and moves no position, and the
                outputs for it are meaningless.
            position_ids: [B, T] or [1, T], positions for LRPE; None to count the real tokens of every sequence. Without
                ``attention_mask``, ``cache`` and ``cu_seqlens``, a position that is not past the one before
                it begins another document, as transformers' ``DataCollatorWithFlattening`` marks them. Looking for
                these waits for the device; ``cu_seqlens`` says the same without.
            past_key_values: the name of ``cache`` before transformers 5.24; either is taken.
            inputs_embeds: [B, T, width], already scaled, as ``get_input_embeddings()`` makes them.
            use_cache: whether to return a cache; None for the configuration's choice, or False in training.
            output_hidden_states: whether to return the hidden states before every block and after the last norm.
            cu_seqlens: [N+1] integers on the inputs' device: B is 1 and N documents are packed; each starts from
                nothing, or from its row of ``cache``. Without ``attention_mask``.
            cu_seq_lens_q: transformers' name for ``cu_seqlens``, which its collators and trainers use.
            cache: what came before; updated in place by this call.
            group: process group whose ranks, in order, hold consecutive slices of every row, [B, T] being this rank's;
                T may differ, and is at least 1. ``attention_mask`` and ``position_ids`` are slices too, and every rank
                gives the same arguments; ``cu_seqlens`` has the borders of the whole row, the same on every rank. There
                is no cache then. Forward and backward are collective.
            **kwargs: what transformers hands to every model and changes nothing here, by name.

        Returns:
            ``last_hidden_state`` [B, T, width], ``cache`` (``past_key_values`` before transformers 5.24), which has a
            row for every document where they are packed, and ``hidden_states`` where asked for.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``; a mask or positions of another shape;
                ``cu_seqlens`` together with ``attention_mask``, with ``cu_seq_lens_q`` or with B above 1;
                ``cache`` of another model's size, or together with gradient checkpointing; ``seq_idx`` or
                ``cu_seq_lens_k`` where nothing else says where documents begin; ``is_causal=False``; ``group`` with
                ``cache``, with ``use_cache=True``, without tokens, or with a mask or ``cu_seqlens`` of another length.
            TypeError: ``cache`` is another kind of cache, a keyword is not known, ``output_hidden_states`` is neither
                True nor False, or ``group`` is not a process group.
        """
        check_keywords(self, kwargs, _COMPANIONS)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        cache = given_cache(TransnormerCache, cache, past_key_values)
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"cache has {len(cache.layers)} layers; the model has {len(self.layers)}")
        cu_seqlens = one_of(cu_seqlens, cu_seq_lens_q)
        if group is not None and (use_cache or cache is not None):
            given = "use_cache is True" if cache is None else "cache is given"
            raise ValueError(f"{given} together with group; slices on several ranks leave no cache")
        if use_cache is None:
            use_cache = group is None and self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not isinstance(output_hidden_states, bool):  # 5.24 has models that take the numbers of layers
            raise TypeError(f"output_hidden_states is {output_hidden_states!r}; it must be True or False")
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("cache is given; gradient checkpointing reads every layer twice, a cache once")
            use_cache = False

        batch, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]  # type: ignore[union-attr]
        if cu_seqlens is not None and (batch != 1 or attention_mask is not None):
            raise ValueError(
                f"cu_seqlens is given with {batch} rows and {'no' if attention_mask is None else 'an'} attention_mask; "
                "packed documents are one row, without a mask"
            )
        if position_ids is not None and position_ids.shape not in ((1, length), (batch, length)):
            raise ValueError(f"position_ids is {list(position_ids.shape)}; it must be [{batch} or 1, {length}]")
        if cu_seqlens is None:
            if may_restart(position_ids, attention_mask, cache):
                cu_seqlens = documents(position_ids, batch) if group is None else None
            elif said := [name for name in _COMPANIONS if kwargs.get(name) is not None]:
                raise ValueError(f"{said[0]} is given without cu_seqlens, cu_seq_lens_q or position_ids")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = TransnormerCache(self.config)
        elif cache is not None:
            cache.leave_inference_mode()
        offsets = None if cache is None else cache.positions
        # One token after others, nothing to differentiate: the states are updated in place. The numbers are the same
        # either way.
        step = length == 1 and offsets is not None and cu_seqlens is None and not torch.is_grad_enabled()
        if group is None:
            packing = pack_batch(
                batch, length, hidden_states.device, mask=local_mask(attention_mask, batch, length),
                position_ids=position_ids, cu_seqlens=cu_seqlens, offsets=offsets, step=step,
            )  # fmt: skip
        else:
            packing = pack_slices(
                batch, length, hidden_states.device, group, cu_seqlens=cu_seqlens, position_ids=position_ids,
                attention_mask=attention_mask,
            )  # fmt: skip

        hidden_states = packing.pack(hidden_states)
        history: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                history.append(packing.unpack(hidden_states, batch))
                hidden_states = packing.pack(history[-1])  # by way of what is returned, so that it can have a gradient
            hidden_states = layer(
                hidden_states, positions=packing.positions, cache=cache, cu_seqlens=packing.cu_seqlens,
                slots=packing.slots, step=step, group=group, local_cu_seqlens=packing.local_cu_seqlens,
            )  # fmt: skip
        hidden_states = packing.unpack(self.norm(hidden_states), batch)
        if cache is not None:
            cache.advance(length, packing.lengths)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*history, hidden_states) if output_hidden_states else None,
            **{CACHE: cache},
        )


class TransnormerForCausalLM(TransnormerPreTrainedModel, GenerationMixin):
    """The model with its output head: next-token logits, the language-modelling loss, and ``generate``.

    Args:
        config: sizes and choices.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(config)
        self.model = TransnormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.vocab_size = config.vocab_size
        self.post_init()

    # What lightning_attention.serving asks of a model.
    context_length = None

    @property
    def embed(self) -> nn.Module:
        """Token ids [T] to [T, width]."""
        return self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, each with ``step`` and ``prefill``."""
        return self.model.layers

    def head(self, hidden_states: Tensor) -> Tensor:
        """What the last block gave, [N, width], to logits [N, vocab_size]."""
        return self.lm_head(self.model.norm(hidden_states))

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: TransnormerCache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None, logits_to_keep: int | Tensor = 0, cache: TransnormerCache | None = None,
        skip_logits: bool | None = None, group: "ProcessGroup | None" = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Next-token logits or, with ``labels``, their loss.

        ``labels``, [B, T] token ids, may be the inputs themselves: they are shifted inside, and -100, or what
        ``ignore_index`` says, is nothing to learn. Where documents are packed, none is asked for the next one's first
        token, and padding is not asked for the token after it. ``shift_labels`` are taken as they come, each for the
        logits at its place. ``logits_to_keep`` computes the logits of the last that many tokens only (0: all), or of
        the columns it lists; not with labels. The other arguments, and what is raised, are those of
        :class:`TransnormerModel`.

        ``skip_logits`` says whether a pass with labels returns no logits; None: as the configuration says. The loss is
        then computed from the hidden states, and logits of all tokens are never in memory. Only a head that is more
        than its weight (adapted, or offloaded) and a loss function other than transformers' need them all the same.

        With ``group``, ``labels`` is this rank's slice: the last token's label is the next rank's first. The loss is
        that of the whole rows, the same on every rank, and the *mean* over the group's ranks of a parameter's gradients
        is its gradient; ``num_items_in_batch`` counts the labels of whole rows.

        Returns:
            ``loss`` (mean negative log-likelihood, nats per token; with ``num_items_in_batch`` the sum over it),
            ``logits`` [B, T, vocab_size] or None, ``cache`` (``past_key_values`` before transformers 5.24), and
            ``hidden_states`` where asked for.
        """
        check_keywords(self, kwargs, (*_COMPANIONS, *OF_THE_LOSS))
        of_the_loss = {name: kwargs.pop(name) for name in OF_THE_LOSS if name in kwargs}
        has_labels = labels is not None or of_the_loss.get("shift_labels") is not None
        if has_labels and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError("logits_to_keep is given with labels; the loss is that of all tokens")
        if skip_logits and not has_labels:
            raise ValueError("skip_logits is True, and there are no labels: nothing would be returned")
        if skip_logits is None:
            skip_logits = self.training if self.config.skip_logits is None else self.config.skip_logits
        cache = given_cache(TransnormerCache, cache, past_key_values)
        cu_seqlens = one_of(cu_seqlens, cu_seq_lens_q)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens, cache=cache, group=group, return_dict=True, **kwargs,
        )  # fmt: skip
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
            hidden_states = hidden_states[:, keep]
        skip_logits = skip_logits and has_labels
        fused = skip_logits and is_plain(self.lm_head) and self.loss_function is ForCausalLMLoss
        logits = None if fused else self.lm_head(hidden_states)
        if labels is not None and group is None:
            ignored = of_the_loss.get("ignore_index", -100)
            labels = learnable(labels, cu_seqlens, position_ids, attention_mask, cache, ignored)
        if fused:
            loss_function = partial(next_token_loss, hidden_states, self.lm_head.weight, labels)
        else:
            loss_function = partial(self.loss_function, logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        loss = None
        if has_labels and group is not None:
            loss = loss_of_slices(
                loss_function, labels, group, cu_seqlens=cu_seqlens, position_ids=position_ids,
                attention_mask=attention_mask, **of_the_loss,
            )  # fmt: skip
        elif has_labels:
            loss = loss_function(**of_the_loss)
        return CausalLMOutputWithPast(
            loss=loss, logits=None if skip_logits else logits, hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )  # fmt: skip

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give ``generate`` its cache before the prompt is read, so that the prompt can be read in pieces.

        Raises:
            ValueError: another kind of cache is asked for, which transformers would ignore.
        """
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {kind!r}; leave it out: this model has one kind of cache, whose size is fixed"
            )
        if "cache" in model_kwargs:  # which generate() passes on as it came, in every version
            model_kwargs[CACHE] = given_cache(
                TransnormerCache, model_kwargs.pop("cache"), model_kwargs.get("past_key_values")
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = TransnormerCache(self.config)
