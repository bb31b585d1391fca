"""The layer with LRPE against the next one, at a size that a CPU does at once."""

from pathlib import Path

import pytest
import torch

from benchmarks.cases import lrpe
from lightning_attention.bench import case
from lightning_attention.bench.report import Report

pytest.importorskip("transformers")
from lightning_attention.models.transnormer import TransnormerConfig
from lightning_attention.models.transnormer.block import TransnormerDecoderLayer


def test_both_layers_are_timed_and_shown(tmp_path: Path):
    assert not case.run(lrpe.CASE, "lrpe", torch.device("cpu"), known_peers={}, out=tmp_path)
    (path,) = tmp_path.glob("lrpe-*.json")
    report = Report.read(path)
    first, second = report.find("lrpe")
    assert (first["layer"], second["layer"]) == ("first", "second")
    assert first["ratio"] == pytest.approx(first["ms"] / second["ms"], rel=1e-4)
    (table,) = lrpe.show(report)
    assert table.rows[0][0] == "385M"


def test_a_step_reaches_every_parameter():
    config = TransnormerConfig.from_name("385M", decoder_embed_dim=32, decoder_attention_heads=2, glu_dim=32)
    layer = TransnormerDecoderLayer(config, 0)
    x = torch.randn(1, 5, 32, requires_grad=True)
    found = lrpe.step(layer, x, torch.arange(5)[None], torch.ones_like(x))()
    assert all(g.abs().sum() > 0 for g in found)
