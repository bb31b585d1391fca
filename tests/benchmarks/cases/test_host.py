import sys

from benchmarks.cases import host
from benchmarks.harness import find
from lightning_attention.bench.attention import BOTH, FORWARD
from lightning_attention.bench.peers import OURS


def test_host_gives_microseconds_or_why_not(report, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    host.measure(run(5, find.peers()["fla"]))
    assert all(1 < r["us"] < 1e6 for r in report.find("host", implementation=OURS))
    assert all("ModuleNotFoundError" in r["error"] for r in report.find("host", implementation="fla"))
    (table,) = host.show(report)
    assert len(table.rows) == 2


def test_the_table_says_what_failed(report):
    ours = {"implementation": OURS, "label": "lightning attention"}
    records = [ours | {"pass": FORWARD, "us": 12.34}, ours | {"pass": BOTH, "error": "RuntimeError"}]
    for record in records:
        report.add("host", **record)
    (table,) = host.show(report)
    assert table.rows[0] == ["lightning attention", "12.3", "failed"]
