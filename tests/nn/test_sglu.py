import pytest
import torch

from lightning_attention.nn import SGLU
from tests.support.numerics import relative_error


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_formula(bias: bool) -> None:
    layer = SGLU(6, 10, bias=bias)
    x = torch.randn(2, 3, 6)
    w = {name: p.double() for name, p in layer.named_parameters()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if bias else 0)

    expected = linear("l3", linear("l1", x.double()) * linear("l2", x.double()))
    assert relative_error(layer(x), expected) <= 1e-6
    assert sorted(w) == sorted(f"l{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")[: 1 + bias])
