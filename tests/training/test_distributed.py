"""Training in several processes, on gloo. What they do is in tests/training/fleet.py."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_attention.training import checkpoint
from tests.cli.test_train import flags
from tests.training.killed_runs import curve
from tests.training.tiny import tiny_settings

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def sail(name: str, folder: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.training.fleet", name, str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-10_000:]


def test_every_mesh_is_the_same_run_and_goes_on_from_any_other(tmp_path):
    sail("same", tmp_path)


def test_what_ends_one_process_ends_all_with_one_message(tmp_path):
    sail("ends", tmp_path)


def test_a_process_is_killed_between_and_during_saves_and_the_run_goes_on(tmp_path):
    sail("kills", tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_torchrun_starts_a_run_again_from_its_last_checkpoint(tmp_path):
    settings = tiny_settings(tmp_path, steps=100, batch_size=4, save_every=20, eval_every=0, keep=1, sp=2)
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "lightning_attention_command"]
    environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/distributed.md
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "train", *flags(settings), "--auto-resume"]
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            checkpoints = tmp_path / "run" / "checkpoints"
            while not checkpoint.checkpoints(checkpoints) and run.poll() is None:
                time.sleep(0.05)
            found = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            workers = [
                pid for pid in found if b"lightning_attention_command" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            os.kill(int(workers[-1]), signal.SIGKILL)
            assert run.wait(timeout=300) == 0, log.read_text()
        finally:
            run.kill()
    text = log.read_text()
    assert len(re.findall(r"^starting: .* in 2 processes \(dp_replicate 1 x dp_shard 1 x sp 2\)", text, re.M)) == 1
    assert len(re.findall(r"^going on from .*step_000000\d0: ", text, re.M)) == 1
    assert len(re.findall(r"^checkpoint: .*step_00000100$", text, re.M)) == 1  # by one process
    steps = [line["step"] for line in curve(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 101))
