import io
import shutil

import pytest

from lightning_attention.cli.app import main
from lightning_attention.training.checkpoint import STATE_FILE
from tests.training.tiny import tiny_settings, train


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    _, outcome = train(tiny_settings(tmp_path_factory.mktemp("run"), steps=20, eval_every=0, save_every=0))
    return outcome.checkpoint


@pytest.fixture
def run(capsys, checkpoint_folder):
    """Call `generate` on the model; its exit status, standard output and standard error."""

    def call(*args: str, model: object = checkpoint_folder) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["generate", "--model", str(model), "--max-tokens", "12", "--ignore-eos", *args])
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


def pipe(monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def test_continues_a_prompt_with_or_without_saying_it(run):
    status, out, err = run("the state")
    assert status == 0, err
    assert out.startswith("the state")
    assert len(out) > len("the state") + 5
    assert out.endswith("\n")
    assert run("the state", "--no-echo")[1] == out.removeprefix("the state")


def test_the_seed_decides(run):
    first = run("the", "--seed", "3")[1]
    assert first == run("the", "--seed", "3")[1]
    assert first != run("the", "--seed", "4")[1]
    assert run("the", "--temperature", "0", "--seed", "3") == run("the", "--temperature", "0", "--seed", "4")


def test_several_prompts_come_out_one_after_another(run):
    alone = [run(prompt, "--seed", str(i))[1] for i, prompt in enumerate(["the", "attention naïve 漢字", "a"])]
    out = run("the", "attention naïve 漢字", "a")[1]
    assert out == "".join(f"=== {i} of 3 ===\n{text}" for i, text in enumerate(alone, 1))


def test_reads_standard_input(run, monkeypatch):
    wanted = run("the state")[1]
    pipe(monkeypatch, "the state")
    assert run("-")[1] == wanted
    pipe(monkeypatch, "the state")
    assert run()[1] == wanted


def test_writes_while_it_generates(run, monkeypatch):
    writes = []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "flush", lambda: writes.append(stream.getvalue()), raising=False)
    monkeypatch.setattr("sys.stdout", stream)
    assert run("the")[0] == 0
    assert writes[0] == "the"
    assert len({*writes}) > 6  # most of the 12 tokens are a piece of text of their own


def test_a_run_its_checkpoint_and_a_plain_hugging_face_folder_are_one(run, checkpoint_folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint_folder, plain)
    (plain / STATE_FILE).unlink()
    wanted = run("the", model=checkpoint_folder)
    assert wanted[0] == 0
    assert run("the", model=plain) == wanted
    assert run("the", model=checkpoint_folder.parent.parent) == wanted


def test_bad_models_are_one_line_and_a_status(run, tmp_path):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing": "error: no such folder: ",
        "empty": "holds no model: neither a config.json nor checkpoints",
        "gpt2": "holds a gpt2; this needs a transnormer",
    }.items():
        status, out, err = run("the", model=tmp_path / name)
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
