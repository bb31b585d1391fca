import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

import lightning_attention as la
from lightning_attention.check import Row
from lightning_attention.cli.check import check, table


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(check)
    return lambda **options: CliRunner().invoke(app, **options)


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
    assert "4 of 23 checks failed" in result.stdout
    assert result.stdout.count(" NO") == 4


@pytest.mark.parametrize("plain", ["", "1"])
def test_a_wrong_row_is_red_in_a_terminal(monkeypatch, capsys, plain):
    right = la.lightning_attention_decode
    monkeypatch.setattr(la, "lightning_attention_decode", lambda *args, **kwargs: 0.99 * right(*args, **kwargs))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", plain)
    with pytest.raises(SystemExit, match="1"):
        check()
    lines = capsys.readouterr().out.splitlines()
    if plain:
        assert not any("\x1b" in line for line in lines)
        return
    red = [line for line in lines if line.startswith("\x1b[31m")]
    named = [next((x for x in ("decode", "rings") if x in line), None) for line in red]
    assert named == ["decode", "rings", "decode", "rings", None]
    assert "4 of 23 checks failed" in red[-1]


def test_the_table_tells_right_from_wrong():
    rows = [
        Row("cpu", "tiled", torch.bfloat16, "output", "output", 0.001, 0.005),
        Row("cpu", "tiled", torch.bfloat16, "gradients", "dq", 0.01, 0.005),
        Row("cpu", "tiled", torch.bfloat16, "decode", "", float("nan"), float("nan"), "RuntimeError: [no] image"),
    ]
    found = table(rows, several_devices=True)
    assert found.rows[0] == ["tiled (cpu)", "bfloat16", "output", "output", "1.0e-03", "5.0e-03", "yes"]
    assert found.rows[1] == ["tiled (cpu)", "bfloat16", "gradients", "dq", "1.0e-02", "5.0e-03", "NO"]
    assert found.rows[2][3:] == ["RuntimeError: [no] image", "–", "–", "NO"]
