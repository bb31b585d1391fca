import io
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from lightning_attention.cli.app import main
from lightning_attention.training import checkpoint
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.metrics import read_metrics
from tests.training.tiny import tiny_settings, write_text


def flags(settings: dict) -> list[str]:
    """Settings as a command line."""
    named = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items() if name != "inputs"]
    return [*settings.get("inputs", []), *(str(part) for pair in named for part in pair)]


@pytest.fixture
def run(capsys):
    """Call the command line; its exit status, standard output and standard error."""

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(args))
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


def test_trains_and_says_where_things_are(run, tmp_path):
    status, out, err = run("train", *flags(tiny_settings(tmp_path)))
    assert status == 0, err
    assert "bits per byte after 6 steps" in out
    for name in ("checkpoints/step_00000006", "loss.png", "metrics.jsonl"):
        assert str(tmp_path / "run" / name) in out
        assert (tmp_path / "run" / name).exists()
    assert "held out" in err
    assert "tokens/s" in err


def test_help_shows_every_setting_in_its_group(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    status, out, _ = run("train", "--help")
    assert status == 0
    for setting in fields(TrainConfig):
        if setting.name != "inputs":
            assert f"--{setting.name.replace('_', '-')} " in out
    for group in ("Data", "Model", "Optimisation", "Run"):
        assert f"─ {group} ─" in out
    assert f"[default: {TrainConfig.seq_len}]" in out


def test_flags_win_over_the_file_and_the_file_over_defaults(run, tmp_path):
    settings = tiny_settings(tmp_path)
    lines = [f"{name} = {value!r}".replace("'", '"') for name, value in settings.items()]
    (tmp_path / "config.toml").write_text("\n".join([*lines, "weight_decay = 0.5", "tie_embeddings = true"]))
    status, _, err = run("train", "--config", str(tmp_path / "config.toml"), "--steps", "4", "--no-tie-embeddings")
    assert status == 0, err
    config = checkpoint.load_state(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1])["config"]
    assert (config["steps"], config["weight_decay"], config["seq_len"]) == (4, 0.5, 24)
    assert config["tie_embeddings"] is False
    assert config["clip"] == TrainConfig.clip


def test_reads_standard_input_and_resumes_without_it(run, tmp_path, monkeypatch):
    text = write_text(tmp_path / "text.txt").read_bytes()
    command = ["train", *flags({**tiny_settings(tmp_path), "inputs": ["-"]})]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert run(*command)[0] == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    status, out, err = run(*command, "--resume", "--steps", "8")
    assert status == 0, err
    assert "going on from" in err
    assert "after 8 steps" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "error: no such file or folder: missing.txt"),
        (["*.nothing"], "error: no file matches *.nothing"),
        (["empty.txt"], "error: there is no text in empty.txt"),
        (["short.txt"], "error: seq_len is 256, but the training text has only "),
        (["--seq-len", "1"], "error: seq_len must be at least 2"),
        (["--config", "missing.toml"], "error: cannot read the configuration missing.toml: No such file or directory"),
        (["--config", "bad.toml"], "error: bad.toml: unknown setting 'seqlen'; did you mean seq_len?"),
        (["--device", "cuda:77"], "error: device cuda:77 is not there"),
        (["--max-minutes", "1", "--steps", "5"], "error: steps must be left out when max_minutes is given"),
        (
            ["--resume", "--overwrite"],
            "error: --resume goes on with a run and --overwrite deletes it; give one of them",
        ),
        (["--out", "short.txt"], "error: cannot make the folder short.txt: File exists"),
    ],
)
def test_bad_input_is_one_line_and_a_status(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a short text\n" * 5)
    (tmp_path / "bad.toml").write_text("seqlen = 5")
    status, out, err = run("train", *arguments)
    assert status == 2
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(message)
    assert "Traceback" not in err


def test_divergence_has_another_status(run, tmp_path):
    settings = tiny_settings(tmp_path, lr=1e30, clip=0.0, steps=20, warmup_steps=0)
    status, _, err = run("train", *flags(settings))
    assert status == 1
    assert "error: the " in err.splitlines()[-1]
    assert "try a lower lr" in err.splitlines()[-1]


def test_ctrl_c_saves_and_exits_cleanly(tmp_path):
    settings = tiny_settings(tmp_path, steps=100_000, eval_every=0, save_every=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_attention.cli", "train", *flags(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while len(read_metrics(metrics)) < 4 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    (saved,) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    step = checkpoint.load_state(saved)["step"]
    assert step >= 3
    assert f"stopped by SIGINT after step {step} of 100000; --resume goes on from there" in out
    assert read_metrics(metrics)[-1]["step"] == step
