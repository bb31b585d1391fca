"""LRPE: linearised relative positional encoding with learnable frequencies."""

import torch
from torch import Tensor, nn

from lightning_attention.nn.sharded import laid_out_like


class LRPE(nn.Module):
    """x → [x cos(θt), x sin(θt)], t the absolute position (arXiv 2307.09270, the cosine form of TransNormerLLM).

    The product of an encoded query and key is Σ_i q_i k_i cos(θ_i (t − s)): it depends on the distance alone, and
    stays linear in the key, which is what linear attention needs. Queries and keys become twice as wide.

    Args:
        num_heads: H.
        head_dim: d. ``theta`` is a learnable [H, 1, d] parameter that starts at 10000^(−2i/(H·d)), i = 0..H·d−1,
            so the first heads turn fast and the last ones slowly.
    """

    #: Sharding that computes in bfloat16 leaves the weights in float32, for the reason below.
    needs_float32 = True

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        # float32 also in a model made in bfloat16, where rounding θ turns the phase at t = 1000 by up to 1.8 radians.
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim, dtype=torch.float32))
        self.reset_parameters()

    def initial_theta(self) -> Tensor:
        """The frequencies a new layer starts from, [H, 1, d] float32, where ``theta`` is and sharded as it is."""
        width = self.num_heads * self.head_dim
        exponents = (-2.0 / width) * torch.arange(width, dtype=torch.float32, device=self.theta.device)
        return laid_out_like((10000.0**exponents).reshape(self.num_heads, 1, self.head_dim), self.theta)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give ``theta`` the frequencies that a new layer starts from."""
        self.theta.copy_(self.initial_theta())

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Encode queries and keys.

        Args:
            q: [B, T, H, d], or [T, H, d].
            k: like q.
            positions: [T], or [B, T] where the rows differ; integers, the absolute position of every token.

        Returns:
            The encoded q and k, [..., H, 2d], in their own dtype. Angles are at least float32.

        Raises:
            ValueError: ``positions`` is neither [T] nor [B, T], or the heads do not fit ``theta``.
        """
        if q.shape != k.shape or q.ndim not in (3, 4) or q.shape[-2:] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"q is {list(q.shape)} and k is {list(k.shape)}; both must be [B, T, {self.num_heads}, {self.head_dim}]"
            )
        tokens = q.shape[:-2]
        if positions.shape not in (tokens[-1:], tokens):  # no set: torch.export hashes no size
            raise ValueError(f"positions is {list(positions.shape)}; it must be {list(tokens[-1:])} or {list(tokens)}")
        theta = self.theta.squeeze(1).to(torch.promote_types(self.theta.dtype, torch.float32))
        angles = positions.to(theta.dtype)[..., None, None] * theta
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return torch.cat([q * cos, q * sin], -1), torch.cat([k * cos, k * sin], -1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
