"""A step's products on a GPU, and a block's step by them against the block's own modules."""

import pytest
import torch

from lightning_attention.kernels.triton.projection import project
from tests.kernels.triton.portable.test_projection import calls, wanted
from tests.kernels.triton.support.device import needs_gpu
from tests.support.numerics import relative_error

pytestmark = needs_gpu
BUDGET = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}  # roundings of the result and what is gated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("K", "O"), [(1024, 4096), (2816, 1024), (1000, 300), (4096, 11008)])
def test_products_are_those_of_float64(dtype: torch.dtype, N: int, K: int, O: int):
    for args in calls(N, K, O):
        args = [x.to("cuda", dtype) if isinstance(x, torch.Tensor) else x for x in args]
        assert relative_error(project(*args), wanted(*args)) < BUDGET[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N", [9, 16, 64, 65, 200, 256, 512])
@pytest.mark.parametrize(("K", "O"), [(1024, 4096), (2816, 1024), (1000, 300), (4096, 11008)])
def test_products_of_many_rows(dtype: torch.dtype, N: int, K: int, O: int):
    for args in calls(N, K, O):
        args = [x.to("cuda", dtype) if isinstance(x, torch.Tensor) else x for x in args]
        assert relative_error(project(*args), wanted(*args)) < BUDGET[dtype]


@pytest.mark.parametrize("N", [1, 5, 64, 300])
def test_a_step_of_a_model_by_products_is_that_of_its_modules(N: int, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    from lightning_attention.models.transnormer import TransnormerConfig, block
    from lightning_attention.models.transnormer.block import TransnormerDecoderLayer

    config = TransnormerConfig(
        vocab_size=64, decoder_embed_dim=256, decoder_attention_heads=4, glu_dim=704, decoder_layers=2
    )
    torch.manual_seed(0)
    for index in range(2):  # with LRPE, and without
        layer = TransnormerDecoderLayer(config, index).to("cuda", torch.bfloat16)
        state = torch.randn_like(layer.allocate_state(N, torch.float32))
        batch = {"positions": torch.arange(N, device="cuda"), "slots": torch.arange(N, device="cuda").flip(0)}
        x, own = torch.randn(N, 256, device="cuda", dtype=torch.bfloat16), state.clone()
        with torch.no_grad():
            found = layer.step(x, state, **batch)
            with monkeypatch.context() as patch:
                patch.setattr(block, "is_plain", lambda linear: False)
                expected = layer.step(x, own, **batch)
        assert relative_error(found, expected.double()) < 1e-2
        assert relative_error(state, own.double()) < 1e-2
        assert not torch.equal(found, x)
