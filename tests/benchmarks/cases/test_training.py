"""Training steps of both models, at a size that a CPU does in seconds."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.cases import training
from lightning_attention.bench import case
from lightning_attention.bench.report import Report

pytest.importorskip("transformers")


def test_both_models_are_timed_and_shown(tmp_path: Path):
    assert not case.run(training.CASE, "training", torch.device("cpu"), known_peers={}, out=tmp_path)
    (path,) = tmp_path.glob("training-*.json")
    report = Report.read(path)
    found = {(r["model"], r["T"]): r for r in report.find("training")}
    assert found.keys() == {("transnormer", 16), ("transnormer", 32), ("llama", 16)}
    for r in found.values():
        assert r["checkpointed"] == (r["T"] == 32)
        assert r["tokens_per_second"] == pytest.approx(1000 * r["B"] * r["T"] / r["ms"], rel=1e-4)
        assert r["loss"] == pytest.approx(math.log(512), rel=0.2)  # of a fresh model, on random tokens
    (table,) = training.show(report)  # no MFU and no peak of memory on a CPU
    assert [row[:2] for row in table.rows] == [["75M", "transnormer"], ["75M", "llama"]]
    assert table.rows[0][3].endswith("*")
    assert table.rows[1][3] == ""


def test_a_step_learns():
    scale = training.SCALES["cpu"]
    from lightning_attention.models.presets import preset

    config = preset("75M", vocab_size=64, decoder_layers=1, decoder_embed_dim=64, decoder_attention_heads=2, glu_dim=64)
    network = training.build(config, "transnormer", scale.dtype, torch.device("cpu"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    step = training._step(network, optimizer, 2, 16, torch.device("cpu"))
    first = float(step())
    for _ in range(5):
        step()
    assert float(step()) < first - 0.1
