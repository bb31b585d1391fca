"""The benchmark measures what it says: right numbers pass, wrong ones are told."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.__main__ import main
from benchmarks.cases import minimax
from lightning_attention.integrations.minimax import LightningMiniMaxAttention


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command, with sizes that take no time: its exit status, and the records it left."""
    cases = (("prompt", 1, 80), ("continuation", 2, 5), ("token", 3, 1))
    tiny = replace(
        minimax.SIZES["cpu"], hidden=32, heads=2, head_dim=16, cases=cases, prompt=9, new_tokens=3, seconds=0
    )
    monkeypatch.setitem(minimax.SIZES, "cpu", tiny)

    def command():
        status = main(["minimax", "--device", "cpu", "--out", str(tmp_path)])
        return status, json.loads((tmp_path / "minimax-cpu.json").read_text())["records"]

    return command


def test_a_run_leaves_tables_and_numbers(run, capsys):
    status, records = run()
    assert status == 0
    assert "MiniMax, one linear layer" in capsys.readouterr().out
    layer = [r for r in records if r["suite"] == "minimax layer"]
    assert len(layer) == 3 * 5
    assert all(r["ms"] > 0 and r["peak_bytes"] > 0 for r in layer)
    errors = [r["relative_error"] for r in layer if r["part"] == "layer"]
    assert len(errors) == 3 * 2
    assert all(1e-9 < e < 1e-5 for e in errors)
    model = [r for r in records if r["suite"] == "minimax model"]
    assert [r["equal_text"] for r in model] == [True] * 4


def test_a_wrong_layer_is_told_by_the_exit_status(run, capsys, monkeypatch):
    right = LightningMiniMaxAttention.forward

    def wrong(self, *args, **kwargs):
        out, state = right(self, *args, **kwargs)
        return out * 1.001, state

    monkeypatch.setattr(LightningMiniMaxAttention, "forward", wrong)
    status, records = run()
    assert status == 1
    assert "our own call failed: relative error 1.0e-03, allowed 1e-05" in capsys.readouterr().out
    assert sum("error" in r for r in records) >= 3


def test_the_part_between_the_projections_computes_the_same():
    size = minimax.SIZES["cpu"]
    layer = minimax.make_layer(size, torch.device("cpu"))
    x = torch.randn(1, 40, size.hidden)
    with torch.no_grad():
        part = minimax.without_projections(layer, x)
        assert torch.equal(layer.out_proj(part(x, None, None)[0]), layer(x, None, None)[0])
    assert isinstance(layer.qkv_proj, torch.nn.Linear)
