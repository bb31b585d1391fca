import pytest
import torch

from lightning_attention.bench import suites, tables
from lightning_attention.bench.op import BACKWARD, BOTH, FORWARD, Shape
from lightning_attention.bench.peers import OURS, ours, peers


@pytest.fixture
def slow_copy(monkeypatch) -> float:
    """A copy rate that is fast to measure and known."""
    monkeypatch.setattr(suites, "copy_rate", lambda _: 1e9)
    return 1e9


def test_shapes_gives_floor_memory_and_errors(report, cpu, slow_copy):
    shape, said = Shape(2, 96, 2, 16), []
    implementations = [ours(), *peers(["sdpa"], cpu)]
    suites.shapes(report, implementations, cpu, said.append, cases=(shape,), seconds=0.01)
    assert report.find("copy") == [{"suite": "copy", "bytes_per_second": slow_copy}]

    (errors,) = report.find("errors")  # none for softmax attention, which is another function
    assert errors["implementation"] == OURS
    assert all(1e-4 < errors[name] < 5e-3 for name in ("output", "dq", "dk", "dv"))

    records = report.find("shapes")
    assert [(r["implementation"], r["pass"]) for r in records] == [
        (OURS, FORWARD), ("sdpa", FORWARD), (OURS, BACKWARD), (OURS, BOTH), ("sdpa", BOTH),
    ]  # fmt: skip
    unit = 2 * 96 * 2 * 16 * 2
    for r, units in zip(records, (4, 4, 7, 11, 11), strict=True):
        assert r["floor_fraction"] == pytest.approx(units * unit / slow_copy * 1e3 / r["ms"], rel=1e-4)
    both = report.find("shapes", implementation=OURS, **{"pass": BOTH})[0]
    assert both["memory_ratio"] == pytest.approx((both["peak_bytes"] + 4 * unit) / (8 * unit), rel=1e-4)
    assert both["memory_ratio"] > 1
    (table,) = tables.of_suite("shapes", records, report)
    assert table.row_count == 1
    assert len(said) == 6


def test_long_shapes_leave_softmax_attention_out(report, cpu, slow_copy, monkeypatch):
    monkeypatch.setattr(suites, "SOFTMAX_MAX_LENGTH", 64)
    suites.shapes(report, [ours(), *peers(["sdpa"], cpu)], cpu, len, cases=(Shape(1, 65, 1, 16),), seconds=0.01)
    assert {r["implementation"] for r in report.find("shapes")} == {OURS}


def test_packings_sum_to_the_tokens_and_look_as_named():
    found = suites.packings(131_072)
    assert {name: sum(lengths) for name, lengths in found.items()} == dict.fromkeys(found, 131_072)
    assert all(min(lengths) >= 1 for lengths in found.values())
    assert set(found["uniform"]) == {8192}
    assert max(found["skewed"]) == 98_304
    assert len(found["skewed"]) == 65
    assert len(set(found["random"])) > 20
    assert found == suites.packings(131_072)  # the same in every run


def test_packed_measures_every_packing_beside_the_dense_shapes(report, cpu):
    suites.packed(report, cpu, len, tokens=512, heads=(2, 1), D=16, dtype=torch.float32, seconds=0.01)
    names = ["dense 1 × 512", "dense 16 × 32", "uniform", "skewed", "random"]
    assert [(r["H"], r["packing"], r["pass"]) for r in report.find("packed")] == [
        (H, name, pass_) for H in (2, 1) for name in names for pass_ in (FORWARD, BOTH)
    ]
    (table,) = tables.of_suite("packed", report.find("packed"), report)
    assert table.row_count == 10
    assert {r["packing"]: r["sequences"] for r in report.find("packed")} == dict(
        zip(names, (1, 16, 16, 65, 32), strict=True)
    )


def test_host_gives_microseconds_or_why_not(report, cpu, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fla", None)
    suites.host(report, [ours(), *peers(["fla"], cpu)], cpu, len)
    assert all(1 < r["us"] < 1e6 for r in report.find("host", implementation=OURS))
    assert all("ModuleNotFoundError" in r["error"] for r in report.find("host", implementation="fla"))
    (table,) = tables.of_suite("host", report.find("host"), report)
    assert table.row_count == 2


def test_constancy_keeps_tokens_and_heads(report, cpu, monkeypatch):
    seen = []
    monkeypatch.setattr(suites, "lengths", lambda *arguments: seen.extend(arguments))
    suites.constancy(report, [ours()], cpu, len)
    sweep = seen[2]
    assert (sweep.H, sweep.D, sweep.tokens) == (16, 128, 1_048_576)
    assert sweep.lengths == (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
    assert sweep.dtype == torch.bfloat16
