"""Which model a configuration gets, and what the optimizer does to its weights."""

import pytest
import torch

from lightning_attention.errors import InputError
from lightning_attention.models.llama import LlamaForCausalLM
from lightning_attention.models.presets import SIZES
from lightning_attention.models.pretrained import load_model
from lightning_attention.models.transnormer import TransnormerForCausalLM
from lightning_attention.training import checkpoint
from lightning_attention.training.config import make_config
from lightning_attention.training.learner import Learner
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.model import new_model
from lightning_attention.training.runtime import Runtime
from tests.training.tiny import tiny_settings, train

KINDS = {"transnormer": TransnormerForCausalLM, "llama": LlamaForCausalLM}


@pytest.mark.parametrize("model", KINDS)
def test_a_size_is_that_of_the_presets(model):
    for name, size in SIZES.items():
        with torch.device("meta"):
            config = new_model(make_config({"model": model, "size": name, "seq_len": 64}), 300).config
        fields = size.fields(model)
        assert {field: getattr(config, field) for field in fields} == fields
        assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (300, 0, 1, 1)


@pytest.mark.parametrize("model", KINDS)
def test_weight_decay_is_on_matrices_alone(model):
    config = make_config({"model": model, "layers": 2, "width": 32, "weight_decay": 0.5})
    learner = Learner(config, Runtime.choose("cpu", "float32"), new_model(config, 300))
    assert type(learner.model) is KINDS[model]
    decayed, others = learner._optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    names = {id(p): name for name, p in learner.model.named_parameters()}
    undecayed = {names[id(p)] for p in others["params"]}
    assert undecayed == {name for name in names.values() if "norm" in name or "theta" in name}
    assert len(undecayed) == (1 if model == "transnormer" else 5)
    assert {names[id(p)] for p in decayed["params"]} == {*names.values()} - undecayed


def test_a_llama_learns_and_goes_on_bit_for_bit(tmp_path):
    settings = tiny_settings(tmp_path, model="llama", glu_dim=None, steps=40, save_every=20, eval_every=0)
    whole, outcome = train(settings)
    assert type(whole.model) is LlamaForCausalLM
    lines = [line["loss"] for line in read_metrics(outcome.metrics) if "loss" in line]
    assert sum(lines[-5:]) < 0.7 * sum(lines[:5])
    checkpoint.remove_folder(outcome.checkpoint)
    resumed, _ = train({"out": settings["out"]}, resume=True)
    assert resumed.resumed_from == whole.folder.checkpoint(20)
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_folder_without_all_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    for model, kind in KINDS.items():
        _, outcome = train(tiny_settings(tmp_path, model=model, out=str(tmp_path / model), steps=1))
        loaded = load_model(outcome.checkpoint)
        assert type(loaded) is kind
        assert loaded.dtype == torch.float32
        weights = outcome.checkpoint / "model.safetensors"
        kept = {name: tensor for name, tensor in load_file(weights).items() if "layers.1" not in name}
        save_file(kept, weights, {"format": "pt"})
        with pytest.raises(InputError, match=r"the model in .* lacks \d+ of its weights: model.layers.1"):
            load_model(outcome.checkpoint)
        weights.unlink()
        with pytest.raises(InputError, match=r"cannot load the model in .*model.safetensors"):
            load_model(outcome.checkpoint)
