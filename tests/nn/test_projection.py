"""A step's products where no kernel is, and which linear layers are plain enough for them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attention.nn.projection import is_plain, project


def test_it_is_what_the_modules_compute():
    x, residual = torch.randn(3, 8), torch.randn(3, 6)
    weight, second, gate = torch.randn(6, 8), torch.randn(6, 8), torch.randn(3, 8)
    y = F.rms_norm(x, (8,), eps=1e-6)
    qkvu = F.linear(y, weight)
    expected = torch.cat([F.silu(qkvu[:, :4]), qkvu[:, 4:]], 1)
    assert torch.equal(project(x, weight, eps=1e-6, silu=4), expected)
    assert torch.equal(
        project(x, weight, gate=gate, residual=residual, eps=1e-6), residual + F.linear(y * gate, weight)
    )
    assert torch.equal(project(x, weight, second=second), F.linear(x, weight) * F.linear(x, second))
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, eps=1e-6, silu=4), expected)
    with pytest.raises(RuntimeError, match="dtype"):
        project(x.bfloat16(), weight)


class Packed(Tensor):
    """As a quantized weight is one."""


def _hooked(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda module, args, output: output * 2)


def _offloaded(linear: nn.Linear) -> None:
    linear.forward = lambda x: x


def _packed(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed))


def test_only_a_weight_and_nothing_else_is_plain():
    assert is_plain(nn.Linear(4, 4, bias=False))
    assert not is_plain(nn.Linear(4, 4))
    assert not is_plain(nn.Identity())
    for change in (_hooked, _offloaded, _packed):
        linear = nn.Linear(4, 4, bias=False)
        change(linear)
        assert not is_plain(linear), change.__name__
