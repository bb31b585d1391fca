"""SimpleRMSNorm: RMS normalisation without a parameter."""

import torch.nn.functional as F
from torch import Tensor, nn


class SRMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) over the last dimension (TransNormerLLM, arXiv 2307.14995, Eq. 10).

    The mean and the root are computed in float32 at least; the output has the input's dtype.

    Args:
        eps: added to the mean square; 1e-6 in every release.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, [..., D] of any floating dtype, over D."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
