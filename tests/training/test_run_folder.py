"""Two runs, and a user's files, in one folder: nothing is lost that this run did not write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_attention.errors import InputError
from lightning_attention.training import checkpoint
from lightning_attention.training.config import make_config
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.run_folder import LOCK, MARKER, RunFolder
from lightning_attention.training.trainer import Trainer
from tests.training.tiny import tiny_settings, train

ROOT = Path(__file__).parents[2]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def hold(folder: Path) -> subprocess.Popen:
    """Another process that has claimed the folder."""
    program = (
        "import pathlib, sys; from lightning_attention.training.run_folder import RunFolder;"
        f"folder = RunFolder(pathlib.Path({str(folder)!r})); folder.claim();"
        "print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    settings = tiny_settings(tmp_path)
    train(settings)
    with hold(tmp_path / "run") as other:
        before = snapshot(tmp_path / "run")
        for how in ({}, {"resume": True}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(InputError, match=rf"run is in use: process {other.pid} on .*, since 2.* trains in it"):
                Trainer(make_config(settings), **how)
        assert snapshot(tmp_path / "run") == before
        other.kill()  # a lock dies with its process
    assert Trainer(make_config(settings), resume=True).step == 6


def test_two_trainers_of_one_process_too(tmp_path):
    first = Trainer(make_config(tiny_settings(tmp_path)))
    with pytest.raises(InputError, match="is in use: process"):
        Trainer(make_config(tiny_settings(tmp_path)))
    assert first.fit().step == 6
    train(tiny_settings(tmp_path), resume=True)


def test_a_failed_start_lets_go_of_the_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(InputError, match="no such file or folder"):
            Trainer(make_config(tiny_settings(tmp_path, inputs=["missing.txt"])))
    train(tiny_settings(tmp_path))


def test_files_of_somebody_else_are_not_touched(tmp_path):
    settings = tiny_settings(tmp_path)
    mine = tmp_path / "run"
    mine.mkdir()
    for name in ("config.toml", "metrics.jsonl", "thesis.unfinished"):
        (mine / name).write_text("years of work")
    before = snapshot(mine)
    for how in ({}, {"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(
            InputError,
            match=r"run holds files that no run wrote \(config.toml, metrics.jsonl, thesis.unfinished\); choose",
        ):
            Trainer(make_config(settings), **how)
    assert snapshot(mine) == before


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()  # of a process that was killed when it had come so far
    train(tiny_settings(tmp_path))
    assert (tmp_path / "run" / MARKER).is_file()


def test_what_is_put_into_a_run_stays_when_it_is_overwritten(tmp_path):
    settings = tiny_settings(tmp_path)
    train(settings)
    mine = [
        tmp_path / "run" / "notes.txt",
        tmp_path / "run" / "chapter.unfinished",
        tmp_path / "run" / "checkpoints" / "best" / "weights.bin",
        tmp_path / "run" / "checkpoints" / "draft.unfinished",
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
    train(settings, overwrite=True)
    train(settings, resume=True)
    assert all(path.read_text() == "years of work" for path in mine)
    # In a checkpoint it keeps the checkpoint, and the run says so before it has deleted anything.
    notes = tmp_path / "run" / "checkpoints" / "step_00000006" / "notes.txt"
    notes.write_text("years of work")
    before = snapshot(tmp_path / "run")
    with pytest.raises(InputError, match=r"step_00000006 holds files that no run wrote \(notes.txt\)"):
        Trainer(make_config(settings), overwrite=True)
    after = snapshot(tmp_path / "run")
    assert {name: after[name] for name in before if name != MARKER} == {n: b for n, b in before.items() if n != MARKER}


def test_overwrite_deletes_nothing_before_the_new_text_has_been_read(tmp_path):
    settings = tiny_settings(tmp_path)
    _, outcome = train(settings)
    for wrong in ({"inputs": ["missing.txt"]}, {"device": "cuda:99"}, {"seq_len": 100_000}):
        with pytest.raises(InputError):
            Trainer(make_config({**settings, **wrong}), overwrite=True)
        assert outcome.checkpoint.is_dir()
        assert len(read_metrics(outcome.metrics)) > 5
    resumed, _ = train(settings, resume=True)
    assert resumed.resumed_from == outcome.checkpoint


def test_leftovers_of_a_killed_run_go(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    for path in (folder.tokens, folder.fresh_tokens, checkpoint.checkpoint_path(folder.checkpoints, 5)):
        checkpoint.unfinished_name(path).mkdir(parents=True)
        (checkpoint.unfinished_name(path) / "half").touch()
    checkpoint.unfinished_name(folder.metrics).touch()
    folder.clear_leftovers()
    assert sorted(snapshot(folder.root)) == [MARKER, LOCK]
    folder.release()


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make the folder .*file: File exists"):
        RunFolder(tmp_path / "file").claim()
    with pytest.raises(InputError, match=r"cannot make the folder .*file/run: Not a directory"):
        RunFolder(tmp_path / "file" / "run").claim()


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs a folder that nobody may write, not even root")
    with pytest.raises(InputError, match="cannot make the folder /proc/run: "):
        RunFolder(Path("/proc/run")).claim()
    # One that is there: a run's folder on a disk that was mounted again for reading alone.
    folder = RunFolder(Path("/proc/self/fdinfo"))
    monkeypatch.setattr(folder, "_refuse_foreign_files", lambda: None)
    with pytest.raises(InputError, match="cannot write in the folder /proc/self/fdinfo"):
        folder.claim()
