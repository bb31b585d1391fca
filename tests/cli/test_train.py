import contextlib
import io
import math
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_attention.cli.app import main
from lightning_attention.cli.train import _show_bar
from lightning_attention.distributed.mesh import Mesh
from lightning_attention.training import checkpoint
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.progress import HeldOutLoss, Outcome, Progress
from lightning_attention.training.runtime import Runtime
from tests.training.test_trainer import spoil_a_weight
from tests.training.tiny import tiny_settings, write_text


def flags(settings: dict) -> list[str]:
    """Settings as a command line."""
    named = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items() if name != "inputs"]
    return [*settings.get("inputs", []), *(str(part) for pair in named for part in pair)]


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
        (["--config", ""], "error: cannot read the configuration : Is a directory"),
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


def test_a_last_step_that_makes_nan_is_no_success(run, tmp_path, monkeypatch):
    spoil_a_weight(monkeypatch, 1, math.nan)
    status, _, err = run("train", *flags(tiny_settings(tmp_path, steps=1)))
    assert status == 1
    assert err.splitlines()[-1] == (
        "error: the held-out loss is nan at step 1; try a lower lr than 0.01; no checkpoint had been written yet"
    )


def test_without_a_terminal_every_logged_step_is_a_line(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # nothing is cut to fit a width
    status, _, err = run("train", *flags(tiny_settings(tmp_path, log_every=2, eval_every=4)))
    assert status == 0, err
    lines = err.splitlines()
    assert lines[0] == "read 1 file: 1 utf-8"
    assert lines[1].startswith("starting: 0.0")
    assert lines[1].endswith(" in a step")
    number = r"\d+\.\d{3}"
    for line, step, measured in zip(lines[2:], (2, 4, 6), (0, 4, 6), strict=True):
        losses = rf"loss {number}, held out {number} at step {measured} bits/byte"
        assert re.fullmatch(rf"step {step}/6  {losses}  [\d,]+ tokens/s  0:00:0\d left", line), line


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["train", *flags(tiny_settings(tmp_path))])
    err = capsys.readouterr().err
    assert "step 2/6" not in err
    assert "tokens/s" in err
    assert "6/6" in err


@pytest.mark.parametrize(("columns", "shown"), [(120, "tokens/s"), (80, "bits/byte"), (40, "loss"), (28, "")])
def test_a_narrow_terminal_costs_numbers_and_not_the_step(tmp_path, columns, shown):
    trainer = SimpleNamespace(planned_steps=1000, step=0)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=columns, color_system=None)
    with _show_bar(console, trainer) as report:
        report(Progress(200, 1000, True, 2.946, 43_219.0, HeldOutLoss(3.253, 200)))
    last = next(line for line in reversed(out.getvalue().splitlines()) if "left" in line or "…" in line)
    assert "200/1000" in last
    assert last.rstrip().endswith("left")
    assert shown in last
    assert "…" not in last


def test_resume_needs_something_to_go_on_from(run, tmp_path):
    command = ["train", *flags(tiny_settings(tmp_path))]
    status, _, err = run(*command, "--resume")
    assert status == 2
    assert "error: there is no checkpoint in " in err
    assert "--auto-resume starts where none is" in err
    assert run(*command, "--auto-resume")[0] == 0
    status, _, err = run(*command, "--auto-resume")
    assert status == 0
    assert "going on from " in err


def test_several_processes_have_to_find_each_other(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run("train", *flags(tiny_settings(tmp_path)))
    assert (status, err) == (
        2,
        "error: WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT are not set: start the processes with torchrun\n",
    )
    assert not (tmp_path / "run").exists()


def test_a_process_that_lost_another_says_so_in_one_line(run, tmp_path, monkeypatch):
    def fit(self, *_):
        self.folder.release()
        self.team.is_launched = True
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:26541. GLHF!")

    monkeypatch.setattr("lightning_attention.training.trainer.Trainer.fit", fit)
    status, _, err = run("train", *flags(tiny_settings(tmp_path)))
    assert status == 1
    assert err.splitlines()[-1] == "error: process 0 lost another one of the run; no checkpoint had been written yet"


def test_a_model_that_does_not_fit_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_attention.training.learner.materialise", lambda *_: torch.empty(1 << 50))
    status, _, err = run("train", *flags(tiny_settings(tmp_path)))
    assert status == 2
    assert err.splitlines()[-1].startswith("error: not enough memory: ")


ODD = ["", "0", "-1", "1", "3", "inf", "-inf", "nan", "1e400", "9" * 23, "0x1", "1.5", "a", "é\udcff", "\ud800", "-",
       "--", "auto", "cuda:99999999999", "cpu", "utf-16", "\n", "/", "..", "a" * 300]  # fmt: skip
TRAIN_OPTIONS = [f"--{f.name.replace('_', '-')}" for f in fields(TrainConfig) if f.name != "inputs"]
TRAIN_OPTIONS += ["--config", "--resume", "--auto-resume", "--overwrite", "--no-compile", ""]
GENERATE_OPTIONS = [
    "--prompts",
    "--max-batch",
    "--model",
    "--max-tokens",
    "--temperature",
    "--top-p",
    "--seed",
    "--device",
    "",
]


@pytest.mark.parametrize("command", ["train", "generate"])
def test_no_value_of_any_option_ends_in_a_traceback(command, tmp_path, monkeypatch):
    """Everything but the training itself runs: what it would need of time and memory is not bounded."""
    monkeypatch.chdir(tmp_path)
    small = tiny_settings(tmp_path, out=str(tmp_path / "run"))
    monkeypatch.setattr("lightning_attention.training.trainer.new_model", lambda *_: torch.nn.Linear(1, 1))
    learner = SimpleNamespace(model=torch.nn.Linear(1, 1), mesh=Mesh(), runtime=Runtime.choose("cpu", "float32"))
    monkeypatch.setattr("lightning_attention.training.trainer.Learner", lambda *_: learner)
    monkeypatch.setattr("lightning_attention.training.trainer.Windows", lambda *_: SimpleNamespace(per_epoch=10))

    def fit(self, *_):
        self.folder.release()
        return Outcome(1, 1, None, None, tmp_path, tmp_path, tmp_path)

    monkeypatch.setattr("lightning_attention.training.trainer.Trainer.fit", fit)
    options = TRAIN_OPTIONS if command == "train" else GENERATE_OPTIONS

    @given(chosen=st.lists(st.tuples(st.sampled_from(options), st.sampled_from(ODD)), max_size=2))
    @settings(max_examples=150, deadline=None)
    def fuzz(chosen):
        own = [*flags(small), "--overwrite"] if command == "train" else []
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff text " * 30), encoding="utf-8"))
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as caught:
            main([command, *own, *(part for pair in chosen for part in pair if part != "")])
        assert caught.value.code in (None, 0, 1, 2), chosen
        assert "Traceback" not in err.getvalue()

    fuzz()
