import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from tests.bench.conftest import cpu, report, run

__all__ = ["cpu", "report", "run"]


@pytest.fixture
def on_two_ranks(tmp_path):
    """A case on two gloo processes: what was printed, and the records."""

    def measured(case: str) -> tuple[str, list[dict]]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = ["-m", "benchmarks", case, "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
        root = Path(benchmarks.__file__).parents[1]
        done = subprocess.run([*torchrun, *arguments], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / f"{case}-cpu.json").read_text())["records"]

    return measured
