"""TransNormerLLM (arXiv 2307.14995, 2405.17381) with the state-dict names of the released checkpoints."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from lightning_attention import decay
from lightning_attention.models.transnormer.cache import TransnormerCache, is_stepping
from lightning_attention.models.transnormer.configuration_transnormer import TransnormerConfig
from lightning_attention.models.transnormer.packing import Packing, document_starts, packed_positions
from lightning_attention.nn import LRPE, SGLU, GatedLinearAttention, SRMSNorm


class TransnormerEmbedding(nn.Embedding):
    """Token embeddings times a constant.

    The scale lives here so that ``get_input_embeddings()(ids)`` is what the model takes as ``inputs_embeds``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """[B, T] token ids → [B, T, embedding_dim]."""
        embedded = super().forward(input)
        return embedded if self.scale == 1.0 else embedded * self.scale


class TransnormerDecoderLayer(GradientCheckpointingLayer):
    """x += GLA(SRMSNorm(x)); x += SGLU(SRMSNorm(x))."""

    def __init__(self, config: TransnormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.token_norm = SRMSNorm()
        self.token_mixer = GatedLinearAttention(
            config.decoder_embed_dim,
            config.decoder_attention_heads,
            decay.transnormer(config.decoder_attention_heads, layer_idx, config.decoder_layers),
            hidden_dim=config.hidden_dim,
            lrpe=bool(config.linear_use_lrpe_list[layer_idx]),
            bias=config.bias,
        )
        self.channel_norm = SRMSNorm()
        self.channel_mixer = SGLU(config.decoder_embed_dim, config.glu_dim, bias=config.bias)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        positions: Tensor,
        past_key_values: TransnormerCache | None = None,
        cu_seqlens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """One block over [B, T, width]; the other arguments are those of :class:`GatedLinearAttention`."""
        x = self.token_norm(hidden_states)
        state = None if past_key_values is None else past_key_values.state(self.layer_idx)
        if is_stepping(past_key_values, x.shape[1]) and cu_seqlens is None:
            mixed = self.token_mixer.step(x.squeeze(1), state, positions=positions, slots=slots).unsqueeze(1)
        else:
            mixed, state = self.token_mixer(
                x, state, positions=positions, cu_seqlens=cu_seqlens, output_state=past_key_values is not None
            )
            if past_key_values is not None:
                past_key_values.update_recurrent_state(state, self.layer_idx)
        hidden_states = hidden_states + mixed
        return hidden_states + self.channel_mixer(self.channel_norm(hidden_states))


class TransnormerPreTrainedModel(PreTrainedModel):
    """What transformers has to know about every class of this model."""

    config: TransnormerConfig
    config_class = TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransnormerDecoderLayer"]  # noqa: RUF012 (transformers reads plain lists)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Frequencies down to 1e-4 times positions up to 1e6: in bfloat16 neighbouring tokens would share an angle.
    _keep_in_fp32_modules_strict = ["theta"]  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, init_std) for matrices, zero for the padding row; frequencies and decays by their formulas."""
        super()._init_weights(module)
        if isinstance(module, LRPE):
            init.copy_(module.theta, module.initial_theta())
        elif isinstance(module, TransnormerDecoderLayer):
            # Not a weight, but as empty as one after loading on the meta device: it is in no checkpoint.
            log_decay = decay.transnormer(
                self.config.decoder_attention_heads, module.layer_idx, self.config.decoder_layers
            )
            init.copy_(module.token_mixer.log_decay, log_decay)


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
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransnormerCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG002 (transformers hands every model what any model may take)
    ) -> BaseModelOutputWithPast:
        """Read a batch, from nothing or from where a cache stands.

        Args:
            input_ids: [B, T] token ids; or give ``inputs_embeds``.
            attention_mask: [B, S] with S ≥ T, zero where a token is padding; the last T columns are this call's.
                Padding may be anywhere, in a continuation too: it changes no state, moves no position, and what is
                computed for it means nothing.
            position_ids: [B, T] or [1, T], positions for LRPE; None to count the real tokens of every sequence.
            past_key_values: what came before; updated in place by this call.
            inputs_embeds: [B, T, width], already scaled, as ``get_input_embeddings()`` makes them.
            use_cache: whether to return a cache; None for the configuration's choice, or False in training.
            output_hidden_states: whether to return the hidden states before every block and after the last norm.
            cu_seqlens: [N+1] integers on the inputs' device: B is 1 and N documents are packed; each starts from
                nothing, or from its row of ``past_key_values``. Without ``attention_mask``.

        Returns:
            ``last_hidden_state`` [B, T, width], ``past_key_values``, and ``hidden_states`` where asked for.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``; a mask or positions of another shape;
                ``cu_seqlens`` together with ``attention_mask`` or with B above 1.
            TypeError: ``past_key_values`` is another kind of cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if past_key_values is not None and not isinstance(past_key_values, TransnormerCache):
            raise TypeError(f"past_key_values is a {type(past_key_values).__name__}; it must be a TransnormerCache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden_states.shape[:2]
        if cu_seqlens is not None and (batch != 1 or attention_mask is not None):
            raise ValueError(
                f"cu_seqlens is given with a batch of {batch} and attention_mask="
                f"{'None' if attention_mask is None else list(attention_mask.shape)}; "
                "packed documents are a batch of 1 without a mask"
            )
        if use_cache and past_key_values is None:
            past_key_values = TransnormerCache(self.config)
        mask = _local_mask(attention_mask, batch, length)
        offsets = None if past_key_values is None else past_key_values.positions
        positions = _positions(position_ids, hidden_states, mask, cu_seqlens, offsets)

        packing, slots = None, None
        if is_stepping(past_key_values, length) and cu_seqlens is None:
            positions = positions.expand(batch, 1).squeeze(1)
            if mask is not None:
                slots = torch.arange(batch, device=mask.device).masked_fill(~mask[:, 0], -1)
        elif mask is not None:
            packing = Packing.from_mask(mask)
            hidden_states = packing.pack(hidden_states)
            positions = packing.pack(positions.expand(batch, length)).squeeze(0)
            cu_seqlens = packing.cu_seqlens

        history: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                history.append(hidden_states)
            hidden_states = layer(
                hidden_states,
                positions=positions,
                past_key_values=past_key_values,
                cu_seqlens=cu_seqlens,
                slots=slots,
            )
        hidden_states = self.norm(hidden_states)
        if packing is not None:
            hidden_states = packing.unpack(hidden_states, batch)
            history = [packing.unpack(h, batch) for h in history]
        if past_key_values is not None:
            past_key_values.advance(length, _lengths(hidden_states, mask, packing, cu_seqlens))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*history, hidden_states) if output_hidden_states else None,
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
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransnormerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits and, with ``labels``, their loss.

        Args:
            labels: [B, T] token ids, -100 where there is nothing to learn; shifted inside, so the inputs themselves
                will do. With ``cu_seqlens`` no document is asked to predict the next one's first token.
            logits_to_keep: compute the logits of the last that many tokens only (0: all), or of these columns.

        The other arguments, and what is raised, are those of :class:`TransnormerModel`.

        Returns:
            ``loss`` (mean negative log-likelihood, nats per token), ``logits`` [B, T, vocab_size],
            ``past_key_values``, and ``hidden_states`` where asked for.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
            hidden_states = hidden_states[:, keep]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = labels.masked_fill(document_starts(cu_seqlens, labels.shape[1]), -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _local_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """This call's columns of a mask, [B, T] bool, or None where nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; it must be [{batch}, {length} or more]")
    mask = attention_mask[:, -length:].bool()
    # Only where looking costs nothing: on a GPU this would wait for the device, in a graph it would break it.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and mask.all():
        return None
    return mask


def _positions(
    position_ids: Tensor | None,
    hidden_states: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """The position of every token, [T] or [B, T]: given, or counted over the real tokens of each sequence."""
    batch, length = hidden_states.shape[:2]
    if position_ids is not None:
        if position_ids.shape not in {(1, length), (batch, length)}:
            raise ValueError(f"position_ids is {list(position_ids.shape)}; it must be [{batch} or 1, {length}]")
        return position_ids[0] if position_ids.shape[0] == 1 else position_ids
    if cu_seqlens is not None:
        return packed_positions(cu_seqlens, length, offsets)
    if mask is None:
        counted = torch.arange(length, device=hidden_states.device)
    else:
        counted = (mask.cumsum(1) - 1).clamp_min(0)
    return counted if offsets is None else counted + offsets.unsqueeze(1)


def _lengths(hidden_states: Tensor, mask: Tensor | None, packing: Packing | None, cu_seqlens: Tensor | None) -> Tensor:
    """How many real tokens each sequence of this call had, [N] int64."""
    if packing is not None:
        return packing.lengths
    if mask is not None:
        return mask.sum(1)
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    batch, length = hidden_states.shape[:2]
    return torch.full((batch,), length, dtype=torch.int64, device=hidden_states.device)
