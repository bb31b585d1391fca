import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

pytest.importorskip("transformers")

from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM

ORACLE = Path(__file__).parents[2] / "data" / "transnormer_tiny.safetensors"


@dataclass(frozen=True)
class Oracle:
    """What the released modelling code computes from a tiny model: its configuration and tensors by name."""

    config: dict
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {n.removeprefix("weight."): t for n, t in self.tensors.items() if n.startswith("weight.")}


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    with safe_open(ORACLE, "pt") as file:
        return Oracle(json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


@pytest.fixture
def model() -> TransnormerForCausalLM:
    """A small model in evaluation, with weights large enough that every part matters to the logits."""
    config = TransnormerConfig(
        vocab_size=97,
        decoder_embed_dim=32,
        decoder_layers=3,
        decoder_attention_heads=2,
        hidden_dim=48,
        glu_dim=40,
        linear_use_lrpe_list=[1, 0, 1],
    )
    model = TransnormerForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.normal_(std=0.15)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (3, 90))
