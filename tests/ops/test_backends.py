import re

import pytest
import torch

from lightning_attention import lightning_attention
from lightning_attention.ops.backends import choose


def test_the_cpu_gets_the_tiled_backend():
    q = torch.randn(1, 200, 2, 16)
    chosen, tiled, reference = (lightning_attention(q, q, q, backend=b).output for b in (None, "tiled", "reference"))
    assert torch.equal(chosen, tiled)
    assert not torch.equal(chosen, reference)


@pytest.mark.parametrize("backend", ["cuda", "", "Tiled"])
def test_an_unknown_backend_is_an_error(backend: str):
    q = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=re.escape(f"backend is {backend!r}; it must be one of 'triton', 'tiled'")):
        lightning_attention(q, q, q, backend=backend)


def test_a_backend_that_the_device_lacks_is_an_error():
    q = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="backend is 'triton', but"):
        lightning_attention(q, q, q, backend="triton")


@pytest.mark.parametrize(("device", "backend"), [("cuda:1", "triton"), ("cpu", "tiled"), ("mps", "tiled")])
def test_the_device_decides_where_no_backend_is_named(device: str, backend: str):
    assert choose(None, torch.device(device)) == backend
