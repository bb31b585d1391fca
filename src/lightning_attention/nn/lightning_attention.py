"""Lightning attention as a layer: the published recipes around the operation, one constructor each."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attention import decay
from lightning_attention.nn.base import FixedDecayAttention
from lightning_attention.nn.lrpe import LRPE
from lightning_attention.nn.rope import rope

_GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu, "linear": lambda u: u}


class RMSNorm(nn.Module):
    """RMS normalisation of the last dimension in equal groups, with or without a weight."""

    def __init__(self, width: int, *, groups: int = 1, weight: bool = True, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width)) if weight else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x if self.groups == 1 else x.unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).reshape(x.shape)
        # Apart: with the float32 weight of autocast, rms_norm warns of a bfloat16 x, and takes the slow way.
        return normed if self.weight is None else normed * self.weight.to(x.dtype)


class LightningAttention(FixedDecayAttention):
    """q, k, v = x W_qkv; out = W_out (gate(x W_gate) ⊙ norm(lightning_attention(q, k, v))).

    q, k and v may pass a silu, then q and k an RMSNorm per head, then a position encoding. :meth:`minimax`,
    :meth:`bailing`, :meth:`minicpm_sala`, :meth:`retnet` and :meth:`transnormer` are the layers of published models;
    every parameter below but ``bias`` is set by at least one of them. The norm over the residual stream before the
    layer, and the residual itself, are the caller's. Each head's state is [D, E]; D is ``head_dim``, or twice that with
    LRPE.

    Args:
        hidden_size: width of the input and the output.
        num_heads: H.
        log_decay: [H] float32, natural logarithm of each head's decay, from :mod:`lightning_attention.decay`.
        head_dim: width of a query and a key; None for hidden_size / H.
        value_dim: E, width of a value; None for ``head_dim``.
        silu: which of q, k and v pass a silu: "" for none, "qk" or "qkv".
        qk_norm: whether q and k pass an RMSNorm over ``head_dim``, each with a weight of its own.
        rope_dim: how many of the first channels of q and k get :func:`~lightning_attention.nn.rope`; even, 0 for none.
        rope_base: base of rope's frequencies.
        lrpe: whether q and k get :class:`~lightning_attention.nn.LRPE`.
        scale: factor on the operation's output; None for head_dim^(−1/2).
        norm_groups: the RMSNorm of the output runs over H · E / norm_groups channels: 1 for all heads together, H for
            each alone.
        norm_weight: whether that norm has a weight, [H · E].
        gate: "sigmoid", "silu" or "linear".
        eps: of every norm.
        bias: whether the projections have biases; no published model has them.

    Raises:
        ValueError: a size is not positive, does not divide or is odd, a choice is none of those above, ``rope_dim``
            and ``lrpe`` are both given, or ``log_decay`` is not [H] float32 with values (it is on the meta device),
            requires a gradient, or holds NaN or a value above 0.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        log_decay: Tensor,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        silu: str = "",
        qk_norm: bool = False,
        rope_dim: int = 0,
        rope_base: float = 10000.0,
        lrpe: bool = False,
        scale: float | None = 1.0,
        norm_groups: int = 1,
        norm_weight: bool = True,
        gate: str = "sigmoid",
        eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        head_dim = _head_dim(hidden_size, num_heads, head_dim)
        super().__init__(hidden_size, num_heads, log_decay)
        value_dim = head_dim if value_dim is None else value_dim
        if value_dim < 1:
            raise ValueError(f"value_dim is {value_dim}; it must be at least 1")
        if silu not in ("", "qk", "qkv"):
            raise ValueError(f"silu is {silu!r}; it must be '', 'qk' or 'qkv'")
        if gate not in _GATES:
            raise ValueError(f"gate is {gate!r}; it must be one of {', '.join(_GATES)}")
        if rope_dim % 2 or not 0 <= rope_dim <= head_dim:
            raise ValueError(f"rope_dim is {rope_dim}; it must be even and from 0 to head_dim, {head_dim}")
        if rope_dim and lrpe:
            raise ValueError(f"rope_dim is {rope_dim} and lrpe is True; a layer has one position encoding")
        if norm_groups < 1 or num_heads * value_dim % norm_groups:
            raise ValueError(f"norm_groups is {norm_groups}; it must divide H · value_dim, {num_heads * value_dim}")
        self.head_dim, self.value_dim = head_dim, value_dim
        self.silu, self.gate, self.scale = silu, gate, head_dim**-0.5 if scale is None else scale
        self.rope_dim, self.rope_base = rope_dim, rope_base
        self._make_projections(bias)
        self.q_norm = RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.lrpe = LRPE(num_heads, head_dim) if lrpe else None
        self.norm = RMSNorm(num_heads * value_dim, groups=norm_groups, weight=norm_weight, eps=eps)

    @classmethod
    def minimax(
        cls, hidden_size: int, num_heads: int, *, layer: int, num_layers: int, head_dim: int | None = None
    ) -> "LightningAttention":
        """MiniMax-Text-01 and M1: silu on q, k and v, RMSNorm over all heads, sigmoid gate, no position encoding."""
        slopes = decay.minimax(num_heads, layer, num_layers)
        return cls(hidden_size, num_heads, slopes, head_dim=head_dim, silu="qkv")

    @classmethod
    def bailing(
        cls,
        hidden_size: int,
        num_heads: int,
        *,
        layer: int,
        num_layers: int,
        head_dim: int | None = None,
        norm_groups: int = 4,
        rope_base: float = 600000.0,
    ) -> "LightningAttention":
        """Ring-linear-2.0, Ling and Ring 2.5 and 2.6: QK-norm, rope on half a head, group RMSNorm, sigmoid gate.

        ``norm_groups`` and ``rope_base`` are ``group_norm_size`` and ``rope_theta`` of their configurations; the
        defaults are Ring-mini-linear-2.0's, Ling-2.5 has 8 and 6,000,000.
        """
        slopes, head_dim = decay.bailing(num_heads, layer, num_layers), _head_dim(hidden_size, num_heads, head_dim)
        return cls(
            hidden_size, num_heads, slopes, head_dim=head_dim, qk_norm=True, rope_dim=head_dim // 2,
            rope_base=rope_base, scale=None, norm_groups=norm_groups,
        )  # fmt: skip

    @classmethod
    def minicpm_sala(cls, hidden_size: int, num_heads: int, *, head_dim: int | None = None) -> "LightningAttention":
        """MiniCPM-SALA, the same on every layer: QK-norm, rope, RMSNorm over all heads, sigmoid gate."""
        slopes, head_dim = decay.alibi(num_heads), _head_dim(hidden_size, num_heads, head_dim)
        return cls(hidden_size, num_heads, slopes, head_dim=head_dim, qk_norm=True, rope_dim=head_dim, scale=None)

    @classmethod
    def retnet(
        cls,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rope_base: float | None = None,
        norm_weight: bool = False,
    ) -> "LightningAttention":
        """RetNet, the same on every layer: rope, values twice as wide, RMSNorm per head without weight, silu gate.

        The authors' frequencies end at 1/10000, those of :func:`rope` a step before; a larger base, the one that None
        stands for, makes them equal. They pair neighbouring channels, which is another order of the rows of W_q and
        W_k. Flash-linear-attention's layer has neither: its base is 10000, and its norm has a weight.
        """
        slopes, head_dim = decay.retnet(num_heads), _head_dim(hidden_size, num_heads, head_dim)
        return cls(
            hidden_size, num_heads, slopes, head_dim=head_dim,
            value_dim=2 * head_dim if value_dim is None else value_dim, rope_dim=head_dim,
            rope_base=10000.0 ** (head_dim / max(head_dim - 2, 1)) if rope_base is None else rope_base, scale=None,
            norm_groups=num_heads, norm_weight=norm_weight, gate="silu",
        )  # fmt: skip

    @classmethod
    def transnormer(
        cls, hidden_size: int, num_heads: int, *, layer: int, num_layers: int, head_dim: int | None = None
    ) -> "LightningAttention":
        """TransNormerLLM: silu on q and k, LRPE on layer 0, SRMSNorm over all heads, a gate without activation."""
        slopes = decay.transnormer(num_heads, layer, num_layers)
        return cls(
            hidden_size, num_heads, slopes, head_dim=head_dim, silu="qk", lrpe=layer == 0, norm_weight=False,
            gate="linear",
        )  # fmt: skip

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, D, E) of one sequence's state."""
        return self.num_heads, self.head_dim * (1 if self.lrpe is None else 2), self.value_dim

    @property
    def _encodes_positions(self) -> bool:
        return self.rope_dim > 0 or self.lrpe is not None

    def _make_projections(self, bias: bool) -> None:
        width_qk, width_v = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        self.qkv_proj = nn.Linear(self.hidden_size, 2 * width_qk + width_v, bias=bias)
        self.gate_proj = nn.Linear(self.hidden_size, width_v, bias=bias)
        self.out_proj = nn.Linear(width_v, self.hidden_size, bias=bias)

    def _linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q and k in one, [..., 2 · H · head_dim], v [..., H · E], and what :meth:`_gate` wants."""
        qkv = self.qkv_proj(x)
        if self.silu == "qkv":
            qkv = F.silu(qkv)
        qk, v = qkv.split([2 * self.num_heads * self.head_dim, self.num_heads * self.value_dim], -1)
        return qk, v, x

    def _gate(self, rest: Tensor) -> Tensor:
        return self.gate_proj(rest)

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # One split and one activation for q and k: the backward is then one concatenation, not padded sums.
        qk, v, rest = self._linear(x)
        return *self._heads(F.silu(qk) if self.silu == "qk" else qk, v, positions), rest

    def _heads(self, qk: Tensor, v: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k [..., H, D] and v [..., H, E] of what :meth:`_linear` gave, activated."""
        q, k = qk.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if positions is not None and self.rope_dim:
            q, k = (rope(z, positions, dim=self.rope_dim, base=self.rope_base) for z in (q, k))
        if positions is not None and self.lrpe is not None:
            q, k = self.lrpe(q, k, positions)
        return q, k, v.unflatten(-1, (self.num_heads, self.value_dim))

    def _finish(self, mixed: Tensor, rest: Tensor) -> Tensor:
        return self.out_proj(self.norm(mixed.flatten(-2)) * _GATES[self.gate](self._gate(rest)))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}, silu={self.silu!r}, "
            f"rope_dim={self.rope_dim}, scale={self.scale:.4g}, norm_groups={self.norm.groups}, gate={self.gate!r}"
        )


def _head_dim(hidden_size: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        if head_dim < 1:
            raise ValueError(f"head_dim is {head_dim}; it must be at least 1")
        return head_dim
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"hidden_size is {hidden_size}; it must be a multiple of num_heads, {num_heads}")
    return hidden_size // num_heads
