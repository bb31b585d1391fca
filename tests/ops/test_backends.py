import re

import pytest
import torch

from lightning_attention import lightning_attention
from lightning_attention.ops import backends


def test_the_cpu_gets_the_tiled_backend():
    assert backends.choose(None, torch.device("cpu")) == "tiled"
    assert backends.choose("reference", torch.device("cpu")) == "reference"


@pytest.mark.parametrize("backend", ["cuda", "", "Tiled"])
def test_an_unknown_backend_is_an_error(backend: str):
    q = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=re.escape(f"backend is {backend!r}; it must be one of 'triton', 'tiled'")):
        lightning_attention(q, q, q, backend=backend)


def test_a_backend_that_the_device_lacks_is_an_error():
    q = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="backend is 'triton', but"):
        lightning_attention(q, q, q, backend="triton")
