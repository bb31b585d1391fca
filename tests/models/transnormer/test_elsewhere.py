"""A folder in a process that has not imported this package, and on other devices than the one it was made on."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from tests.support.numerics import relative_error
from tests.training.tiny import tiny_settings, train

PROMPTS = ["lightning attention", "the"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}

# What `transformers serve` and `transformers chat` do with a folder, short of opening a port.
STRANGER = """
import json, sys
folder, prompts, greedy = json.loads(sys.argv[1])
import transformers
from transformers.cli.serving.model_manager import ModelManager
assert not any(name.startswith("lightning_attention") for name in sys.modules)
manager = ModelManager(force_model=folder, trust_remote_code=True, device="cpu")
model, tokenizer = manager.load_model_and_processor(manager.process_model_name(folder))
assert manager.get_model_modality(model, tokenizer).name == "LLM"
talk = tokenizer.apply_chat_template([{"role": "user", "content": prompts[0]}], tokenize=False)
pipe = transformers.pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
texts = [out[0]["generated_text"] for out in pipe(prompts, batch_size=2, **greedy)]
same = type(pipe.model) is type(model)
first, second = folder + "/again", folder + "/again-alone"
model.save_pretrained(first)
transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(second)
print(json.dumps({"class": type(model).__module__, "same": same, "talk": talk, "texts": texts}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lightning-attention train` saves."""
    where = tmp_path_factory.mktemp("trained")
    return train(tiny_settings(where, steps=30, eval_every=30, save_every=30))[1].checkpoint


def test_in_a_process_that_knows_nothing_of_it(folder: Path) -> None:
    pipe = pipeline("text-generation", model=str(folder), device="cpu")
    assert type(pipe.model) is TransnormerForCausalLM
    expected = [out[0]["generated_text"] for out in pipe(PROMPTS, batch_size=2, **GREEDY)]
    for prompt, text in zip(PROMPTS, expected, strict=True):  # the shorter one is padded on the left
        assert pipe(prompt, **GREEDY)[0]["generated_text"] == text
    assert expected[0].strip()
    arguments = json.dumps([str(folder), PROMPTS, GREEDY])
    done = subprocess.run([sys.executable, "-c", STRANGER, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {
        "class": "lightning_attention.models.transnormer.modeling",
        "same": True,
        "talk": "lightning attention\n",
        "texts": expected,
    }
    # Saved again by that process, the folder holds and names what it did: no source of this package.
    config = json.loads((folder / "config.json").read_text())
    for again, files in (("again", {"generation_config.json", "model.safetensors"}), ("again-alone", set())):
        assert {f.name for f in (folder / again).iterdir()} == {"config.json", "transnormer.py", *files}
        assert (folder / again / "transnormer.py").read_text() == (folder / "transnormer.py").read_text()
        assert json.loads((folder / again / "config.json").read_text())["auto_map"] == config["auto_map"]


def test_a_class_of_ones_own_brings_its_source(model: TransnormerForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "their_model.py").write_text(
        "from lightning_attention.models.transnormer import TransnormerForCausalLM\n\n\n"
        "class Theirs(TransnormerForCausalLM):\n    pass\n"
    )
    spec = importlib.util.spec_from_file_location("their_model", tmp_path / "their_model.py")
    module = sys.modules["their_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Theirs.register_for_auto_class("AutoModelForCausalLM")
    module.Theirs(model.config).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "their_model.py").exists()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "their_model.Theirs"


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
def test_attention_implementations_choose_nothing(
    model: TransnormerForCausalLM, ids: Tensor, tmp_path: Path, kind: str
) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=kind)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    made = AutoModelForCausalLM.from_config(model.config, attn_implementation=kind)
    made.set_attn_implementation(kind)
    assert made(ids).logits.shape == (3, 90, 97)


def test_the_pointer_is_written_whatever_the_folder_came_with(tmp_path: Path) -> None:
    released = {"model_type": "transnormer", "auto_map": {"AutoConfig": "configuration_transnormer.TransnormerConfig"}}
    (tmp_path / "config.json").write_text(json.dumps({**released, "decoder_layers": 1}))
    config = TransnormerConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "saved")
    files = {
        value.split(".")[0] for value in json.loads((tmp_path / "saved/config.json").read_text())["auto_map"].values()
    }
    assert files == {"transnormer"}
    assert "import TransnormerConfig" in (tmp_path / "saved" / "transnormer.py").read_text()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "split"])
def test_device_maps(model: TransnormerForCausalLM, ids: Tensor, tmp_path: Path, device_map: str | dict) -> None:
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head"]
    device_map = dict.fromkeys(parts, "cpu") if device_map == "split" else device_map
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_layers_on_the_disk(model: TransnormerForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.model.layers[1].token_mixer.qkvu_proj.weight.is_meta  # read when it is used
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    mask = torch.ones_like(ids).index_fill_(1, torch.arange(7), 0)
    packed = {"input_ids": ids[:1], "cu_seqlens": torch.tensor([0, 30, 90])}
    assert torch.equal(loaded(ids, attention_mask=mask).logits[:, 7:], model(ids, attention_mask=mask).logits[:, 7:])
    assert torch.equal(loaded(**packed).logits, model(**packed).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **greedy), model.generate(ids, **greedy))


def test_a_block_is_not_split(model: TransnormerForCausalLM) -> None:
    accelerate = pytest.importorskip("accelerate")
    whole = sum(p.numel() * 4 for p in model.parameters())
    # accelerate keeps room for the largest part that must come together, so not all of the 90 % is used.
    room = {0: 9 * whole // 10, "cpu": whole}
    places = accelerate.infer_auto_device_map(model, room, no_split_module_classes=list(model._no_split_modules))
    assert set(places.values()) == {0, "cpu"}
    assert {place for place in places if "layers" in place} == {f"model.layers.{i}" for i in range(3)}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes(model: TransnormerForCausalLM, ids: Tensor, tmp_path: Path, name: str) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **{name: torch.bfloat16})
    assert loaded.dtype == loaded(ids).logits.dtype == torch.bfloat16
    assert loaded(ids)[CACHE].state(0).dtype == torch.float32
    assert relative_error(loaded(ids).logits.float(), model(ids).logits) <= 0.05
    loaded.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", **{name: "auto"}).dtype == torch.bfloat16


@pytest.mark.parametrize("trust", [None, False, True])
def test_code_that_came_with_a_release_is_not_run(model: TransnormerForCausalLM, tmp_path: Path, trust: bool) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "theirs.TransnormerConfig",
        "AutoModelForCausalLM": "theirs.TransnormerForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("raise RuntimeError('the code of the release')")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(loaded) is TransnormerForCausalLM
