import sys

import torch

from benchmarks.cases import host
from benchmarks.harness import find
from benchmarks.harness.pool import DECODE, PREFILL
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape
from lightning_attention.bench.peers import OURS


def test_host_gives_microseconds_or_why_not(report, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    host.measure(run(5, find.peers()["fla"]))
    assert all(1 < r["us"] < 1e6 for r in report.find("host", implementation=OURS))
    assert all("ModuleNotFoundError" in r["error"] for r in report.find("host", implementation="fla"))
    operations = [DECODE, PREFILL, "verify", "commit"]
    assert [r["pass"] for r in report.find("host", implementation=OURS)] == [
        FORWARD, BOTH, *operations, *[f"{name}, rings" for name in operations]
    ]  # fmt: skip
    assert all(0 < r["busy_us"] < 1e6 for r in report.find("host") if "us" in r)
    table, pool = host.show(report)
    assert (pool.columns, [row[0] for row in pool.rows]) == (["", "without rings", "rings"], operations)
    assert [row[0] for row in table.rows] == [
        "lightning attention",
        "an empty autograd.Function",
        "flash-linear-attention",
    ]


def test_the_empty_function_is_one_of_three_inputs(cpu):
    problem = Problem(Shape(1, 4, 2, 8), torch.bfloat16, cpu)
    assert [x.shape for x in problem.results(host.EMPTY)] == [(1, 4, 2, 8)] * 4


def test_the_table_says_what_failed(report):
    ours = {"implementation": OURS, "label": "lightning attention"}
    records = [ours | {"pass": FORWARD, "us": 12.34}, ours | {"pass": BOTH, "error": "RuntimeError"}]
    for record in records:
        report.add("host", **record)
    (table,) = host.show(report)
    assert table.rows[0] == ["lightning attention", "12.3", "failed"]
