import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import MiniMaxConfig, MiniMaxForCausalLM

from lightning_attention.integrations.minimax import apply_lightning_attention

LINEAR, SOFTMAX = "linear_attention", "full_attention"

#: Transformers' default; the published layout; and no softmax at all.
LAYOUTS = {"1:1": [SOFTMAX, LINEAR] * 2, "7:1": [LINEAR] * 7 + [SOFTMAX], "linear": [LINEAR] * 2}


def build(layout: str, seed: int = 0, **changes) -> MiniMaxForCausalLM:
    """A small model in evaluation, with weights large enough that every part matters to the logits."""
    torch.manual_seed(seed)
    layers = LAYOUTS[layout]
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "head_dim": 8, "block_size": 16}
    config = MiniMaxConfig(
        vocab_size=97,
        num_hidden_layers=len(layers),
        layer_types=layers,
        num_key_value_heads=2,
        num_local_experts=3,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.2,
        **sizes | changes,
    )
    model = MiniMaxForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # the default wants sizes that are multiples of 16 bytes
    return model


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture
def pair() -> Callable[..., tuple[MiniMaxForCausalLM, MiniMaxForCausalLM]]:
    """The original and ours, of the same weights."""

    def make(layout: str, *, seed: int = 0, state_dtype: torch.dtype = torch.float32, **changes):
        original = build(layout, seed, **changes)
        ours = copy.deepcopy(original)
        apply_lightning_attention(ours, state_dtype=state_dtype)
        return original, ours

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (3, 50))


@pytest.fixture
def padded(ids) -> Callable[[str], tuple[Tensor, Tensor]]:
    """Three prompts of 50, 31 and 40 tokens with padding on one side: ids and mask."""

    def make(side: str) -> tuple[Tensor, Tensor]:
        mask = torch.ones_like(ids)
        for row, length in enumerate((50, 31, 40)):
            if side == "left":
                mask[row, : 50 - length] = 0
            else:
                mask[row, length:] = 0
        return ids * mask, mask

    return make
