"""What TransNormerLLM is made of: the embedding and the block."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_attention import decay
from lightning_attention.models.transnormer.cache import TransnormerCache
from lightning_attention.models.transnormer.configuration import TransnormerConfig
from lightning_attention.models.transnormer.mixer import TransnormerMixer
from lightning_attention.nn import SGLU, SRMSNorm
from lightning_attention.nn.lightning_attention import RMSNorm
from lightning_attention.nn.projection import is_bare, is_plain, is_watched, project
from lightning_attention.ops.recent import RecentTokens

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TransnormerEmbedding(nn.Embedding):
    """Token embeddings times a constant.

    The scale lives here so that ``get_input_embeddings()(ids)`` is what the model takes as ``inputs_embeds``, under the
    name by which PEFT finds it: what an adapter adds to a row must be scaled too.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.embed_scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """[B, T] token ids → [B, T, embedding_dim]."""
        embedded = super().forward(input)
        return embedded if self.embed_scale == 1.0 else embedded * self.embed_scale


class TransnormerDecoderLayer(GradientCheckpointingLayer):
    """x += TransnormerMixer(SRMSNorm(x)); x += SGLU(SRMSNorm(x))."""

    def __init__(self, config: TransnormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.token_norm = SRMSNorm()
        log_decay = decay.transnormer(config.decoder_attention_heads, layer_idx, config.decoder_layers)
        self.token_mixer = TransnormerMixer(
            config.decoder_embed_dim,
            config.decoder_attention_heads,
            log_decay,
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
        cache: TransnormerCache | None = None,
        cu_seqlens: Tensor | None = None,
        slots: Tensor | None = None,
        step: bool = False,
        group: "ProcessGroup | None" = None,
        local_cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """One block over [B, T, width]; what is not said here is :class:`TransnormerMixer`'s.

        With ``step`` the layer's state is updated in place, by one token per row.
        """
        if step:
            assert cache is not None  # a step comes after something
            held, recent = cache.with_ring(self.layer_idx, self.token_mixer)
            x = hidden_states.squeeze(1)
            return self.step(x, held, positions=positions, slots=slots, recent=recent).unsqueeze(1)
        state = None if cache is None else cache.state(self.layer_idx)
        mixed, state = self.token_mixer(
            self.token_norm(hidden_states),
            state,
            positions=positions,
            cu_seqlens=cu_seqlens,
            output_state=cache is not None,
            group=group,
            local_cu_seqlens=local_cu_seqlens,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return self._mix_channels(hidden_states + mixed)

    def allocate_state(self, rows: int, dtype: torch.dtype) -> Tensor:
        """A pool of states, [rows, H, D, E]."""
        return self.token_mixer.allocate_state(rows, dtype)

    def allocate_recent(self, rows: int, length: int) -> RecentTokens:
        """Rings of recent tokens beside such a pool."""
        return self.token_mixer.allocate_recent(rows, length)

    def step(self, x: Tensor, state: Tensor, **batch: Any) -> Tensor:
        """One token per sequence, [N, width]; the arguments are those of :meth:`TransnormerMixer.step`."""
        mixer = self.token_mixer
        if not self._is_as_made() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return self._mix_channels(x + mixer.step(self.token_norm(x), state, **batch))
        # The same, in four products that have the norms, activations, gates and sums within.
        qkvu, out, l1, l2, l3 = (linear.weight for linear in self._linears())
        activated = 2 * mixer.num_heads * mixer.head_dim
        mixed, u = mixer.attend_step(project(x, qkvu, eps=self.token_norm.eps, silu=activated), state, **batch)
        x = project(mixed, out, gate=u, residual=x, eps=mixer.norm.eps)
        return project(project(x, l1, second=l2, eps=self.channel_norm.eps), l3, residual=x)

    def _linears(self) -> tuple[nn.Linear, ...]:
        mixer, glu = self.token_mixer, self.channel_mixer
        return mixer.qkvu_proj, mixer.out_proj, glu.l1, glu.l2, glu.l3

    def _is_as_made(self) -> bool:
        """Whether no part was replaced or has a hook, so that a step may compute what they do without calling them."""
        return (
            is_bare(self.token_norm, SRMSNorm)
            and is_bare(self.token_mixer, TransnormerMixer)
            and is_bare(self.token_mixer.norm, RMSNorm)
            and is_bare(self.channel_norm, SRMSNorm)
            and is_bare(self.channel_mixer, SGLU)
            and all(map(is_plain, self._linears()))
            and not is_watched()
        )

    def prefill(self, x: Tensor, state: Tensor, **batch: Any) -> Tensor:
        """Packed tokens, [T, width]; the arguments are those of :meth:`TransnormerMixer.prefill`."""
        return self._mix_channels(x + self.token_mixer.prefill(self.token_norm(x), state, **batch))

    def _mix_channels(self, x: Tensor) -> Tensor:
        return x + self.channel_mixer(self.channel_norm(x))
