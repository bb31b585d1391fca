"""A block of TransNormerLLM, and which of its parts a step may compute without calling them."""

import torch
from torch import Tensor, nn

from lightning_attention.models.transnormer import TransnormerConfig
from lightning_attention.models.transnormer.block import TransnormerDecoderLayer


def test_a_step_calls_what_somebody_changed_or_watches():
    """Hooks on any part, and other parts, in steps as in whole passes."""
    config = TransnormerConfig(
        vocab_size=50, decoder_embed_dim=16, decoder_attention_heads=2, glu_dim=16, decoder_layers=2
    )
    torch.manual_seed(0)
    layer = TransnormerDecoderLayer(config, 1).eval()

    def stepped() -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return layer.step(torch.randn(3, 16), layer.allocate_state(3, torch.float32), positions=torch.arange(3))

    plain = stepped()
    for name in ("token_norm", "token_mixer.norm", "channel_norm", "channel_mixer", "channel_mixer.l3"):
        handle = layer.get_submodule(name).register_forward_hook(lambda module, args, output: output + 1)
        assert not torch.allclose(stepped(), plain), name
        handle.remove()
        assert torch.equal(stepped(), plain)
    layer.channel_norm = nn.LayerNorm(16)
    assert not torch.allclose(stepped(), plain)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(module))
    stepped()
    handle.remove()
    assert layer.token_mixer.out_proj in calls
