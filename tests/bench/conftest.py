import pytest
import torch

from lightning_attention.bench.report import Report, environment


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def report(tmp_path, cpu) -> Report:
    return Report(tmp_path / "op.json", environment(cpu))
