import random

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from lightning_attention.training.config import make_config
from lightning_attention.training.learner import _new_optimizer
from tests.training.tiny import tiny_settings, train


def decays(model: PreTrainedModel) -> dict[str, float]:
    """The weight decay of every parameter, by the last parts of its name."""
    groups = _new_optimizer(make_config({"weight_decay": 0.25}), model).param_groups
    by_parameter = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(by_parameter) == sum(len(group["params"]) for group in groups)
    return {".".join(name.split(".")[-3:]): by_parameter[id(p)] for name, p in model.named_parameters()}


def test_matrices_decay_and_nothing_else():
    config = TransnormerConfig(
        vocab_size=10, decoder_embed_dim=8, decoder_layers=1, decoder_attention_heads=2, glu_dim=8, bias=True
    )
    found = decays(TransnormerForCausalLM(config))
    matrices = {"model.embed_tokens.weight", "lm_head.weight", "token_mixer.qkvu_proj.weight",
                "token_mixer.out_proj.weight", "channel_mixer.l1.weight", "channel_mixer.l2.weight",
                "channel_mixer.l3.weight"}  # fmt: skip
    assert {name for name, decay in found.items() if decay == 0.25} == matrices
    others = {name for name, decay in found.items() if decay == 0}
    assert "token_mixer.lrpe.theta" in others
    assert others - {"token_mixer.lrpe.theta"} == {
        name.replace("weight", "bias") for name in matrices if "mixer" in name
    }


def test_norms_of_a_softmax_model_do_not_decay():
    config = LlamaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    found = decays(LlamaForCausalLM(config))
    assert {name for name, decay in found.items() if decay == 0} == {
        "0.input_layernorm.weight", "0.post_attention_layernorm.weight", "model.norm.weight",
    }  # fmt: skip
    assert set(found.values()) == {0, 0.25}


def test_the_seed_is_all_that_chance_decides(tmp_path):
    def run(state: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        trainer, _ = train(tiny_settings(tmp_path, out=str(tmp_path / f"{state} {seed}"), steps=2, seed=seed))
        return list(trainer.model.parameters()), trainer._windows.step(0)

    one, windows = run(state=1, seed=5)
    again, same_windows = run(state=2, seed=5)
    assert all(map(torch.equal, one, again))
    assert torch.equal(windows, same_windows)
    other, other_windows = run(state=1, seed=6)
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(windows, other_windows)
