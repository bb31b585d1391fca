"""Gated linear attention: the token mixer of TransNormerLLM."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attention.nn.linear_attention_layer import LinearAttentionLayer
from lightning_attention.nn.lrpe import LRPE
from lightning_attention.nn.srmsnorm import SRMSNorm
from lightning_attention.ops.attention import lightning_attention


class GatedLinearAttention(LinearAttentionLayer):
    """q, k, v, u = split(x W_qkvu); q, k = silu; out = W_out (u ⊙ SRMSNorm(lightning_attention(q, k, v))).

    The norm runs over all heads concatenated. One recurrent state, [B, H, D, E] float32, carries everything the
    layer has read: :meth:`forward` takes and returns it for any number of tokens, so training, prefill and a
    continuation in pieces are one path; :meth:`step` and :meth:`prefill` update rows of a pool of states in place, one
    token per sequence or any number of packed ones; :meth:`verify` and :meth:`commit` do so with drafts.
    E is ``head_dim``; D is ``head_dim``, or twice that with LRPE.

    Args:
        embed_dim: width of the input and the output.
        num_heads: H.
        log_decay: [H] float32, natural logarithm of each head's decay, from :mod:`lightning_attention.decay`. Kept
            in float32 whatever the layer is cast to: bfloat16 would move a decay of 0.999 by as much as 0.004.
        hidden_dim: H · head_dim; None for ``embed_dim``.
        lrpe: whether queries and keys get :class:`LRPE`.
        bias: whether the projections have biases; no release has them.

    Raises:
        ValueError: ``hidden_dim`` is not a multiple of ``num_heads``, or ``log_decay`` is not [H] float32 with values
            (it is on the meta device), requires a gradient, or holds NaN or a value above 0.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        log_decay: Tensor,
        *,
        hidden_dim: int | None = None,
        lrpe: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(num_heads, log_decay)
        hidden_dim = embed_dim if hidden_dim is None else hidden_dim
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim is {hidden_dim}; it must be a multiple of num_heads, {num_heads}")
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.head_dim = hidden_dim // num_heads
        self.qkvu_proj = nn.Linear(embed_dim, 4 * hidden_dim, bias=bias)
        self.out_proj = nn.Linear(hidden_dim, embed_dim, bias=bias)
        self.norm = SRMSNorm()
        self.lrpe = LRPE(num_heads, self.head_dim) if lrpe else None

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, D, E) of one sequence's state."""
        return self.num_heads, self.head_dim * (1 if self.lrpe is None else 2), self.head_dim

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix any number of tokens, from any state.

        Args:
            x: [B, T, embed_dim].
            state: [N, H, D, E] float32 (float64 in a float64 layer), what came before; None for nothing. Not modified;
                differentiable.
            positions: [T] or [B, T] integers, absolute positions for LRPE; None for a count from 0 in every sequence.
                A layer without LRPE does not look at them.
            cu_seqlens: [N+1] integers: B is 1 and N sequences are packed in x. None: N = B.
            output_state: whether to return the state after x.

        Returns:
            The output, like x, and the new state, like ``state``, or None.

        Raises:
            ValueError: the layer has LRPE, and ``state`` is given without ``positions``.
        """
        positions = self._positions(x, state, positions, cu_seqlens)
        qk, v, u = self._project(x)
        q, k = qk.unbind(2)
        if self.lrpe is not None and positions is not None:
            q, k = self.lrpe(q, k, positions)
        mixed, state = lightning_attention(
            q,
            k,
            v,
            self.log_decay,
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
        )
        return self._finish(mixed, u), state

    def _tokens(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._check_positions(x, positions)
        qk, v, u = self._project(x)
        q, k = qk.unbind(1)
        if self.lrpe is not None and positions is not None:
            q, k = (z.squeeze(0) for z in self.lrpe(q.unsqueeze(0), k.unsqueeze(0), positions))
        return q, k, v, u

    @property
    def _encodes(self) -> bool:
        return self.lrpe is not None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activated q and k as [..., 2, H, d], v as [..., H, d], u as [..., hidden_dim]; v and u are views."""
        # One split and one activation for q and k: the backward is then one concatenation, not four padded sums.
        qk, v, u = self.qkvu_proj(x).split([2 * self.hidden_dim, self.hidden_dim, self.hidden_dim], -1)
        qk = F.silu(qk).unflatten(-1, (2, self.num_heads, self.head_dim))
        return qk, v.unflatten(-1, (self.num_heads, self.head_dim)), u

    def _finish(self, mixed: Tensor, u: Tensor) -> Tensor:
        return self.out_proj(u * self.norm(mixed.flatten(-2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
