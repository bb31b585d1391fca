import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_attention.training import trained as module
from lightning_attention.training.trained import open_trained
from tests.training.tiny import tiny_settings, train


@pytest.fixture(scope="module", params=["transnormer", "llama"])
def outcome(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return train(tiny_settings(folder, model=request.param, steps=4, save_every=2))[1]


def test_is_a_folder_that_transformers_loads(run, outcome, tmp_path):
    target = tmp_path / "new" / "model"
    status, out, err = run("export", outcome.checkpoint.parents[1], target)  # a run's newest
    assert status == 0, err
    assert out.startswith(f"{target}: ")
    assert out.endswith(f"M weights, of {outcome.checkpoint}\n")
    kept = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names = {path.name for path in target.iterdir()}
    assert kept <= names
    assert names - kept <= {"transnormer.py", "chat_template.jinja", "special_tokens_map.json"}
    # By which transformers finds the model in a process that has not imported the package.
    kind = open_trained(outcome.checkpoint).model.config.model_type
    assert ("transnormer.py" in names) is (kind == "transnormer")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    theirs = open_trained(outcome.checkpoint)
    ids = tokenizer("the state of the block", return_tensors="pt").input_ids
    assert torch.equal(model.eval()(ids).logits, theirs.model.eval()(ids).logits)
    assert model.generate(ids, max_new_tokens=4).shape[1] == ids.shape[1] + 4
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_an_earlier_checkpoint_and_an_empty_folder(run, outcome, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    earlier = outcome.checkpoint.with_name("step_00000002")
    assert run("export", earlier, target)[0] == 0
    ours, newest = (open_trained(path).model.state_dict() for path in (target, outcome.checkpoint))
    theirs = open_trained(earlier).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(ours[name], newest[name]) for name in theirs)


def test_touches_nothing_that_is_there(run, outcome, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(outcome.checkpoint.parents[1].rglob("*"))
    for target in (tmp_path / "full", tmp_path / "file", outcome.checkpoint, outcome.checkpoint.parents[1]):
        status, out, err = run("export", outcome.checkpoint, target)
        assert (status, out) == (2, "")
        assert err == f"error: {target} is there already and not an empty folder; choose a new or an empty one\n"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert sorted(outcome.checkpoint.parents[1].rglob("*")) == before


def test_is_whole_or_not_there(run, outcome, tmp_path, monkeypatch):
    def fail(model, folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_model", fail)
    status, out, err = run("export", outcome.checkpoint, tmp_path / "model")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in {"missing": "no such folder: ", "empty": "holds no model"}.items():
        status, _, err = run("export", tmp_path / source, tmp_path / "model")
        assert status == 2
        assert message in err
    assert not (tmp_path / "model").exists()
