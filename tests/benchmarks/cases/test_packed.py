import torch

from benchmarks.cases import packed
from lightning_attention.bench.attention import BOTH, FORWARD


def test_packings_sum_to_the_tokens_and_look_as_named():
    found = packed.packings(131_072)
    assert {name: sum(lengths) for name, lengths in found.items()} == dict.fromkeys(found, 131_072)
    assert all(min(lengths) >= 1 for lengths in found.values())
    assert set(found["uniform"]) == {8192}
    assert max(found["skewed"]) == 98_304
    assert len(found["skewed"]) == 65
    assert len(set(found["random"])) > 20
    assert found == packed.packings(131_072)  # the same in every run


def test_packed_measures_every_packing_beside_the_dense_shapes(report, run):
    packed.measure(run(packed.Scale(512, (2, 1), 16, torch.float32, 0.01)))
    names = ["dense 1 × 512", "dense 16 × 32", "uniform", "skewed", "random"]
    assert [(r["H"], r["packing"], r["pass"]) for r in report.find("packed")] == [
        (H, name, pass_) for H in (2, 1) for name in names for pass_ in (FORWARD, BOTH)
    ]
    (table,) = packed.show(report)
    assert len(table.rows) == 10
    assert {r["packing"]: r["sequences"] for r in report.find("packed")} == dict(
        zip(names, (1, 16, 16, 65, 32), strict=True)
    )


def test_the_table_compares_with_one_dense_sequence(report):
    records = [{"H": 8, "packing": packing, "pass": pass_, "ms": ms}
               for packing, ms in (("dense 1 × 512", 1.0), ("skewed", 1.1)) for pass_ in (FORWARD, BOTH)]  # fmt: skip
    for record in records:
        report.add("packed", **record)
    (table,) = packed.show(report)
    assert table.rows[1] == ["8", "skewed", "1.1000 (1.10)", "1.1000 (1.10)"]
