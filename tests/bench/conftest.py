from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_attention.bench.case import Run
from lightning_attention.bench.peers import Peer
from lightning_attention.bench.report import Report, environment


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def report(tmp_path, cpu) -> Report:
    return Report(tmp_path / "op.json", environment(cpu))


@pytest.fixture
def run(report, cpu):
    """What a case gets, with a scale and peers of the test."""

    def make(scale: Any, peers: Sequence[Peer] = (), backend: str | None = None) -> Run:
        return Run(report, cpu, scale, peers, backend, say=len)

    return make
