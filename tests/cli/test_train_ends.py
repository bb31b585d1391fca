"""How a run ends that does not end by itself: signals, closed terminals, disks that are full."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_attention.cli.app import main
from lightning_attention.training import checkpoint, trainer
from lightning_attention.training.metrics import read_metrics
from tests.cli.test_train import flags
from tests.training.tiny import tiny_settings, train

resource = pytest.importorskip("resource", reason="needs POSIX")
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lightning_attention_command", "train"]
LONG = {"steps": 100_000, "eval_every": 0, "save_every": 0}


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def none_goes_on() -> Iterator[None]:
    yield
    while _started:
        _started.pop().kill()


def start(settings: dict, *more: str, **how) -> subprocess.Popen:
    """A run in a process of its own, four steps on."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    process = subprocess.Popen([*COMMAND, *flags(settings), *more], cwd=ROOT, text=True, **how)
    _started.append(process)
    metrics = Path(settings["out"]) / "metrics.jsonl"
    while len(read_metrics(metrics)) < 5 and process.poll() is None:
        time.sleep(0.02)
    return process


def saved_step(out: Path) -> int:
    return checkpoint.load_state(checkpoint.checkpoints(out / "checkpoints")[-1])["step"]


def test_ctrl_c_saves_and_is_the_exit_status(tmp_path):
    process = start(tiny_settings(tmp_path, **LONG))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    step = saved_step(tmp_path / "run")
    assert step >= 4
    assert f"stopped by SIGINT after step {step} of 100000; --resume goes on from there" in out
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_is_acknowledged_before_it_is_saved(tmp_path, capsys, monkeypatch, name, status):
    step_once = trainer.Trainer._train_step

    def step_and_send(self, stop):
        if self.step == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return step_once(self, stop)

    monkeypatch.setattr(trainer.Trainer, "_train_step", step_and_send)
    with pytest.raises(SystemExit) as caught:
        main(["train", *flags(tiny_settings(tmp_path))])
    out, err = capsys.readouterr()
    assert caught.value.code == status
    assert re.search(
        rf"^{name}: finishing step \d+, then saving it; a second signal stops at once, without it$", err, re.M
    )
    assert f"stopped by {name} after step 3 of 6; --resume goes on from there" in out
    assert "held-out loss: " in out
    assert "after 3 steps" in out
    assert saved_step(tmp_path / "run") == 3


def test_a_second_signal_stops_at_once_and_says_what_is_kept(tmp_path, capsys, monkeypatch):
    settings = tiny_settings(tmp_path, save_every=2)

    def save(self, folder):
        if folder.name.startswith("step_00000004"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(trainer.WeightsToWrite, "write", save)
    with pytest.raises(SystemExit) as caught:
        main(["train", *flags(settings)])
    assert caught.value.code == 130
    err = capsys.readouterr().err
    kept = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert f"SIGINT again: stopping now; {kept} is whole, and --resume goes on from it" in err
    assert f"stopped by SIGINT at once: {kept} is whole" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def test_ctrl_c_while_the_text_is_read(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "prepare_data", stop)
    with pytest.raises(SystemExit) as caught:
        main(["train", *flags(tiny_settings(tmp_path))])
    assert caught.value.code == 130
    assert "stopped before the first step; what was in the folder is as it was" in capsys.readouterr().err


def test_a_closed_terminal_saves(tmp_path):
    import fcntl
    import pty
    import termios

    terminal, end = pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ends = {"stdin": end, "stdout": end, "stderr": end}
    process = start(tiny_settings(tmp_path, **LONG), preexec_fn=own_terminal, **ends)
    os.close(end)
    assert process.poll() is None
    os.close(terminal)
    assert process.wait(timeout=120) == 129
    assert saved_step(tmp_path / "run") >= 4


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    process = start(tiny_settings(tmp_path, steps=60, save_every=0, eval_every=0))
    process.stderr.close()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert saved_step(tmp_path / "run") == 60


@contextlib.contextmanager
def no_file_over(size: int):
    """Let this process write no larger file: what a quota does, for every user."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_when_a_checkpoint_is_written(tmp_path, capsys):
    settings = tiny_settings(tmp_path, width=64)
    train(settings)
    (whole,) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1:]
    assert (whole / "model.safetensors").stat().st_size > 60_000
    with no_file_over(60_000), pytest.raises(SystemExit) as caught:
        main(["train", *flags({**settings, "steps": 9}), "--resume"])
    assert caught.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    target = tmp_path / "run" / "checkpoints" / "step_00000008"
    assert re.fullmatch(
        rf"error: cannot write {target}: .*File too large.* \([\d,.]+ MB free there\); "
        rf"{whole} is whole, and --resume goes on from it",
        last,
    ), last
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")][-1] == "step_00000006"
    _, outcome = train({**settings, "steps": 9}, resume=True)
    assert outcome.step == 9


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_full_when_the_optimizer_or_the_record_is_written(tmp_path, capsys, monkeypatch):
    settings = tiny_settings(tmp_path)
    train(settings)
    command = ["train", *flags({**settings, "steps": 9}), "--resume"]
    for name in ("trainer_state.pt", "metrics.jsonl"):
        with monkeypatch.context() as patch:
            refuse_writes_to(name, patch)
            with pytest.raises(SystemExit) as caught:
                main(command)
        assert caught.value.code == 1
        err = capsys.readouterr().err
        assert re.search(
            r"^error: cannot write \S+: No space left on device \(.* MB free there\); \S+step_00000006 is whole",
            err,
            re.M,
        )
    _, outcome = train({**settings, "steps": 9}, resume=True)
    assert outcome.step == 9


def refuse_writes_to(name: str, patch: pytest.MonkeyPatch) -> None:
    """Let `name` be /dev/full, where everything can be opened and nothing written."""
    opened = Path.open

    def open_full(path, mode="r", *more, **how):
        full = path.name == name and mode[0] in "wa"
        return opened(Path("/dev/full") if full else path, mode, *more, **how)

    patch.setattr(Path, "open", open_full)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_has_no_room_for_the_text(tmp_path, small_disk, capsys):
    (tmp_path / "text.txt").write_text("".join(f"line {number} of the text\n" for number in range(60_000)))
    settings = tiny_settings(tmp_path, out=str(small_disk / "run"))
    with pytest.raises(SystemExit) as caught:
        main(["train", *flags(settings)])
    assert caught.value.code == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: cannot write \S+tokens.new: No space left on device \(0\.\d MB free there\); "
        "what was in the folder is as it was",
        err,
    ), err


def test_a_real_disk_that_fills_up(tmp_path, small_disk, capsys):
    settings = tiny_settings(tmp_path, out=str(small_disk / "run"), keep=20, steps=40)
    with pytest.raises(SystemExit) as caught:
        main(["train", *flags(settings)])
    err = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 1
    assert re.match(r"error: cannot write \S+: .*No space left on device.* \(0\.\d MB free there\); ", err), err
    assert "is whole, and --resume goes on from it" in err
    assert saved_step(small_disk / "run") >= 2


def test_a_full_folder_for_temporary_files_is_in_nobodys_way(tmp_path, small_disk, capsys, monkeypatch):
    with (small_disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(small_disk).free == 0
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n" * 50)))
    with pytest.raises(SystemExit) as caught:
        main(["train", *flags(tiny_settings(tmp_path)), "-"])
    assert not caught.value.code, capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--model", str(tmp_path / "run"), "--max-tokens", "3", "a", "b"])
    assert not caught.value.code, capsys.readouterr().err
    assert "=== 2 of 2 ===" in capsys.readouterr().out
