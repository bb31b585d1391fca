"""The token mixer of TransNormerLLM, under the weight names of the released checkpoints."""

from torch import Tensor, nn

from lightning_attention.nn import LightningAttention
from lightning_attention.ops.decode import lightning_attention_decode
from lightning_attention.ops.recent import RecentTokens


class TransnormerMixer(LightningAttention):
    """q, k, v, u = split(x W_qkvu); q, k = silu; out = W_out (u ⊙ SRMSNorm(lightning_attention(q, k, v))).

    The layer of :meth:`~lightning_attention.nn.LightningAttention.transnormer` with all that x is multiplied by in one
    matrix, which is how the releases store it. The norm runs over all heads concatenated; D is ``head_dim``, or twice
    that with LRPE, and E is ``head_dim``.

    Args:
        embed_dim: width of the input and the output.
        num_heads: H.
        log_decay: [H] float32, natural logarithm of each head's decay, from ``decay.transnormer``.
        hidden_dim: H · head_dim; None for ``embed_dim``.
        lrpe: whether queries and keys get :class:`~lightning_attention.nn.LRPE`.
        bias: whether the projections have biases; no release has them.

    Raises:
        TypeError, ValueError: as for ``LightningAttention``, or ``hidden_dim`` is not a multiple of ``num_heads``.
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
        hidden_dim = embed_dim if hidden_dim is None else hidden_dim
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim is {hidden_dim}; it must be a multiple of num_heads, {num_heads}")
        super().__init__(
            embed_dim, num_heads, log_decay, head_dim=hidden_dim // num_heads, silu="qk", lrpe=lrpe, norm_weight=False,
            gate="linear", bias=bias,
        )  # fmt: skip

    def _make_projections(self, bias: bool) -> None:
        hidden_dim = self.num_heads * self.head_dim
        self.qkvu_proj = nn.Linear(self.hidden_size, 4 * hidden_dim, bias=bias)
        self.out_proj = nn.Linear(hidden_dim, self.hidden_size, bias=bias)

    def _linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._split(self.qkvu_proj(x))

    def _split(self, qkvu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_dim = self.num_heads * self.head_dim
        qk, v, u = qkvu.split([2 * hidden_dim, hidden_dim, hidden_dim], -1)
        return qk, v, u

    def attend_step(
        self, qkvu: Tensor, state: Tensor, *, positions: Tensor | None = None, slots: Tensor | None = None,
        recent: RecentTokens | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What :meth:`step` does between its products: of x W_qkvu, q and k activated, to the operation's output and u.

        Both are [N, H · head_dim].
        """
        qk, v, u = self._split(qkvu)
        q, k, v = self._heads(qk, v, positions)
        mixed = lightning_attention_decode(q, k, v, self.log_decay, state, slots=slots, scale=self.scale, recent=recent)
        return mixed.flatten(-2), u

    def _gate(self, rest: Tensor) -> Tensor:
        return rest
