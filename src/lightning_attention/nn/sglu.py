"""SGLU: the gated linear unit without an activation."""

from torch import Tensor, nn


class SGLU(nn.Module):
    """l3(l1(x) ⊙ l2(x)) (TransNormerLLM, arXiv 2307.14995, Eq. 8): the product is the only non-linearity.

    Args:
        embed_dim: width of the input and the output.
        glu_dim: width of the product.
        bias: whether the three projections have biases; no release has them.
    """

    def __init__(self, embed_dim: int, glu_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.l1 = nn.Linear(embed_dim, glu_dim, bias=bias)
        self.l2 = nn.Linear(embed_dim, glu_dim, bias=bias)
        self.l3 = nn.Linear(glu_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, [..., embed_dim], to the same shape."""
        return self.l3(self.l1(x) * self.l2(x))
