"""The products of a block's step, at a size that a CPU does at once."""

from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.cases import products
from lightning_attention.bench import case
from lightning_attention.bench.report import Report
from lightning_attention.check import relative_error


def test_each_product_is_timed_and_shown(tmp_path: Path):
    assert not case.run(products.CASE, "products", torch.device("cpu"), known_peers={}, out=tmp_path)
    (path,) = tmp_path.glob("products-*.json")
    report = Report.read(path)
    assert [r["product"] for r in report.find("products")] == ["qkvu", "out", "glu", "down"]
    assert all(r["relative_error"] < 1e-6 and r["us"] > 0 for r in report.find("products"))
    (table,) = products.show(report)
    assert [row[:2] for row in table.rows] == [["385M", "9"]]


def test_they_are_those_of_a_block():
    found = products.products(8, 12, 3, torch.empty(0, dtype=torch.float64))
    (((weight, second),), (x, gate, residual, eps, silu)) = found["glu"]
    y = F.rms_norm(x, (8,), eps=eps)
    assert (gate, residual, silu) == (None, None, 0)
    assert (
        relative_error(products.composed(x, weight, second, *found["glu"][1][1:]), (y @ weight.T) * (y @ second.T))
        < 1e-12
    )
    assert {name: inputs[0].shape[1] for name, (_, inputs) in found.items()} == {
        "qkvu": 8,
        "out": 8,
        "glu": 8,
        "down": 12,
    }
    assert {name: len(weights[0][0]) for name, (weights, _) in found.items()} == {
        "qkvu": 32,
        "out": 8,
        "glu": 12,
        "down": 8,
    }
