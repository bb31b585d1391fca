import pytest
import typer
from typer.testing import CliRunner

import lightning_attention as la
from lightning_attention.cli.check import check


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(check)
    return lambda: CliRunner().invoke(app, env={"COLUMNS": "120"})


def test_a_working_installation(run):
    result = run()
    assert result.exit_code == 0
    assert f"lightning-attention {la.__version__}" in result.stdout
    assert "tiled      available, the default" in result.stdout
    assert "triton     not here: it needs a CUDA or ROCm device" in result.stdout
    assert "checks passed" in result.stdout
    assert " NO " not in result.stdout


def test_a_broken_operation_is_told_by_the_exit_status(run, monkeypatch):
    right = la.lightning_attention_decode
    monkeypatch.setattr(la, "lightning_attention_decode", lambda *args, **kwargs: 0.99 * right(*args, **kwargs))
    result = run()
    assert result.exit_code == 1
    assert "2 of 21 checks failed" in result.stdout
    assert result.stdout.count(" NO") == 2
