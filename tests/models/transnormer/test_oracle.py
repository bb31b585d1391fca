"""The released modelling code's numbers, through the folder format of the releases."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from tests.models.transnormer.conftest import Oracle
from tests.support.numerics import relative_error

TOLERANCE = 1e-4


def write_release(oracle: Oracle, folder: Path, kind: str) -> None:
    config = {
        "model_type": "transnormer",
        "architectures": ["TransnormerForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM"},
        **oracle.config,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: w.contiguous() for name, w in oracle.weights.items()}
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names, index = sorted(weights), {}
        for i, half in enumerate((names[::2], names[1::2])):
            file = f"model-{i + 1:05}-of-00002.safetensors"
            save_file({n: weights[n] for n in half}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(half, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture
def released(oracle: Oracle, tmp_path: Path) -> TransnormerForCausalLM:
    write_release(oracle, tmp_path, "safetensors")
    return AutoModelForCausalLM.from_pretrained(tmp_path)


def test_logits_hidden_states_states_and_loss(oracle: Oracle, released: TransnormerForCausalLM) -> None:
    ids = oracle["input_ids"]
    out = released(ids, labels=ids, use_cache=True, output_hidden_states=True)
    assert relative_error(out.logits, oracle["out.logits"]) <= TOLERANCE
    assert relative_error(out.loss.reshape(1), oracle["out.loss"]) <= TOLERANCE
    assert len(out.hidden_states) == released.config.num_hidden_layers + 1
    for i, hidden in enumerate(out.hidden_states):
        assert relative_error(hidden, oracle[f"out.hidden_states.{i}"]) <= TOLERANCE
    for i in range(released.config.num_hidden_layers):
        assert relative_error(out[CACHE].state(i), oracle[f"out.state.{i}"]) <= TOLERANCE


def test_every_gradient(oracle: Oracle, released: TransnormerForCausalLM) -> None:
    released.train()
    released(oracle["input_ids"], labels=oracle["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in released.named_parameters()}
    assert {f"grad.{name}" for name in gradients} == {n for n in oracle.tensors if n.startswith("grad.")}
    for name, gradient in gradients.items():
        assert relative_error(gradient, oracle[f"grad.{name}"]) <= TOLERANCE, name


@torch.no_grad()
def test_greedy_decoding(oracle: Oracle, released: TransnormerForCausalLM) -> None:
    out = released(oracle["input_ids"], use_cache=True)
    tokens, logits, newest = [], [], out.logits[:, -1]
    for _ in range(8):
        tokens.append(newest.argmax(-1))
        out = released(tokens[-1].unsqueeze(1), cache=out[CACHE])
        newest = out.logits[:, -1]
        logits.append(newest)
    assert torch.equal(torch.stack(tokens, 1), oracle["out.decode_tokens"])
    assert relative_error(torch.stack(logits, 1), oracle["out.decode_logits"]) <= TOLERANCE


def test_generate_says_the_same_tokens(oracle: Oracle, released: TransnormerForCausalLM) -> None:
    said = released.generate(oracle["input_ids"], do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(said[:, oracle["input_ids"].shape[1] :], oracle["out.decode_tokens"])


@pytest.mark.parametrize("kind", ["bin", "sharded"])
def test_other_files_of_the_release_format(oracle: Oracle, tmp_path: Path, kind: str) -> None:
    write_release(oracle, tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is TransnormerForCausalLM
    assert relative_error(model(oracle["input_ids"]).logits, oracle["out.logits"]) <= TOLERANCE


def test_save_and_reload(oracle: Oracle, released: TransnormerForCausalLM, tmp_path: Path) -> None:
    released.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    reloaded = TransnormerForCausalLM.from_pretrained(tmp_path / "saved")
    assert {n: tuple(p.shape) for n, p in reloaded.state_dict().items()} == {
        n: tuple(w.shape) for n, w in oracle.weights.items()
    }
    assert torch.equal(reloaded(oracle["input_ids"]).logits, released(oracle["input_ids"]).logits)


@pytest.mark.parametrize(
    "change", [{"no_scale_embedding": True}, {"linear_use_lrpe_list": [0, 0, 0]}, {"linear_use_lrpe_list": [1, 1, 0]}]
)
def test_a_model_that_differs_does_not_pass(oracle: Oracle, change: dict) -> None:
    model = TransnormerForCausalLM(TransnormerConfig(**{**oracle.config, **change}))
    model.load_state_dict(oracle.weights, strict=False)
    assert relative_error(model(oracle["input_ids"]).logits, oracle["out.logits"]) > 100 * TOLERANCE
