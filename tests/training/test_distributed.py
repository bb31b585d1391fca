"""Training in several processes, on gloo. What they do is in tests/training/fleet.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.skipif("KILLS" not in os.environ, reason="takes minutes; KILLS=20 runs it")
def test_a_process_is_killed_twenty_times(tmp_path):
    sail("many_kills", tmp_path)
