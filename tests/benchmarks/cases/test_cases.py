import math

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import cases
from benchmarks.cases.cases import HOST_ROWS, ROWS, SCALES, HostRow, Row, Scale
from benchmarks.harness.find import peers as known_peers
from lightning_attention.bench import peers
from lightning_attention.bench.attention import BACKWARD, BOTH, FORWARD
from lightning_attention.bench.peers import ATTENTION, OURS, PACKED_ATTENTION, Peer
from lightning_attention.bench.report import Report

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = Row("small", 2, 70, 2, 16, 8, wanted=cases.floor(1e-9, 1e9))


def named(case: str) -> Row:
    return next(row for row in SCALES["cpu"].rows if row.case == case)


@pytest.fixture(autouse=True)
def slow_copy(monkeypatch) -> float:
    """A copy rate that is fast to measure and known."""
    monkeypatch.setattr(cases, "copy_rate", lambda _: 1e9)
    return 1e9


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_rows_have_names_of_their_own_and_want_what_is_measured(scale):
    names = scale.names()
    assert len(set(names)) == len(names)
    for row in scale.rows:
        assert set(row.wanted) <= set(row.passes)
        assert {quantity for quantity, _ in row.wanted.values()} <= {cases.FLOOR, cases.RATIO, cases.MS}
        assert row.against or cases.RATIO not in {quantity for quantity, _ in row.wanted.values()}
        assert sum(row.lengths) in (0, row.B * row.T)


def test_the_floor_is_the_bytes_of_the_definition():
    assert SMALL.bytes(FORWARD) == 2 * 70 * 2 * (16 + 16 + 8 + 8) * 2
    assert SMALL.bytes(BACKWARD) == 2 * 70 * 2 * (16 + 16 + 8 + 8 + 16 + 16 + 8) * 2
    assert SMALL.bytes(BOTH) == SMALL.bytes(FORWARD) + SMALL.bytes(BACKWARD)
    main_case = ROWS[0]
    tokens = main_case.B * main_case.T * main_case.H
    assert (main_case.bytes(FORWARD), main_case.bytes(BACKWARD)) == (1024 * tokens, 1792 * tokens)


def test_a_row_gives_time_floor_error_and_what_is_wanted(report, run, slow_copy):
    cases.measure(run(Scale((SMALL,), (), 0.0, 1)))
    forward, backward = report.find("cases")
    assert [r["pass"] for r in (forward, backward)] == [FORWARD, BACKWARD]
    for r in (forward, backward):
        assert (r["case"], r["B"], r["T"], r["H"], r["D"], r["E"]) == ("small", 2, 70, 2, 16, 8)
        assert r["floor_fraction"] == pytest.approx(SMALL.bytes(r["pass"]) / slow_copy * 1e3 / r["ms"], rel=1e-4)
        assert 1e-4 < r["relative_error"] < 5e-3
        assert "error" not in r
    assert (forward["worst"], forward["met"]) == ("output", True)
    assert (backward["met"], backward["bound"]) == (False, 1e9)
    table, sentence = cases.show(report)
    assert [row[6:8] for row in table.rows] == [["≥ 1e-09", "yes"], ["≥ 1e+09", "NO"]]
    assert sentence == "met 1 of 2; not met: small (2, 70, 2, 16, 8, backward)"


@pytest.mark.parametrize(
    ("case", "base"),
    [
        ("LRPE layer", {"D": 32}),
        ("learnable log_decay", {"learnable": False}),
        ("packed, 640 of 100", {"lengths": []}),
        ("batch_invariant", {"batch_invariant": False}),
    ],
)
def test_ratios_are_to_the_call_without_it(case, base, report, run):
    row = named(case)
    cases.measure(run(Scale((row,), (), 0.0, 1)))
    records = Report.read(report.path).find("cases")
    assert [r["pass"] for r in records] == list(row.passes)
    assert all(r["against"] == base and 0.01 < r["ratio"] < 100 and "error" not in r for r in records)
    if row.learnable:
        assert records[0]["worst"] in ("dq", "dk", "dv", "dlog_decay")


def test_wrong_numbers_are_a_failure_of_ours(report, run, monkeypatch):
    right = peers.ours().attention()
    wrong = Peer(OURS, "ours", "", {ATTENTION: lambda: lambda q, k, v, d: right(q, k, v, d) * 1.01})
    monkeypatch.setattr(Row, "ours", lambda *_: wrong)
    cases.measure(run(Scale((SMALL,), (), 0.0, 1)))
    assert all("relative error 1.0e-02, allowed 5e-03" in r["error"] for r in report.find("cases"))


def test_float32_has_its_own_budgets():
    assert Row("", *[1] * 5, dtype=FP32).budget("output") < 1e-5
    rough = Row("", *[1] * 5, dtype=FP32, precision="high").budget("output")
    assert rough == Row("", *[1] * 5).budget("output") < 6e-3


def test_peers_get_the_rows_that_they_have(cpu):
    plain = Peer("plain", "", "", {ATTENTION: lambda: "dense"})
    both = Peer("both", "", "", {ATTENTION: lambda: "dense", PACKED_ATTENTION: lambda bounds: bounds.tolist()})
    softmax = Peer("softmax", "", "", {ATTENTION: lambda: "dense"}, softmax=True)
    everyone = [plain, both, softmax]
    assert SMALL.others(everyone, cpu) == [plain, both]
    assert named("learnable log_decay").others(everyone, cpu) == named("batch_invariant").others(everyone, cpu) == []
    (packed,) = named("packed, 9000 of 7").others(everyone, cpu)
    assert packed.attention() == list(range(0, 57, 7))
    assert PACKED_ATTENTION in known_peers()["fla"][0].operations


def test_a_missing_peer_does_not_hide_the_others(report, run):
    def missing() -> None:
        raise ModuleNotFoundError("no such package")

    cases.measure(run(Scale((SMALL,), (), 0.0, 1), [Peer("bad", "bad", "", {ATTENTION: missing})]))
    assert all("ModuleNotFoundError" in r["error"] for r in report.find("cases", implementation="bad"))
    assert all("ms" in r for r in report.find("cases", implementation=OURS))
    assert next(cases.show(report)).rows[0][-1] == "failed"


def test_a_peer_is_measured_in_the_passes_that_it_has_and_called_wrong_where_it_is(report, run):
    right = peers.ours().attention()
    loads = {"right": lambda: right, "wrong": lambda: lambda q, k, v, d: right(q, k, v, d) * 1.1}
    forward_only = [Peer(name, name, "", {ATTENTION: load}, backward=False) for name, load in loads.items()]
    cases.measure(run(Scale((SMALL,), (), 0.0, 1), forward_only))
    forward, backward = next(cases.show(report)).rows
    assert forward[-2].endswith("×)")
    assert forward[-1].endswith("×, wrong)")
    assert backward[-2:] == ["", ""]


@pytest.mark.parametrize("in_flight", [False, True])
def test_the_host_is_held_against_softmax_attention(in_flight, report, run):
    row = HostRow("host", (1, 8, 1, 8), (FORWARD, BOTH), "sdpa_flash", 1e9, in_flight)
    cases.measure(run(Scale((), (row,), 0.0, 20)))
    own, softmax = (report.find("cases host", implementation=name) for name in (OURS, "sdpa"))
    assert [r["pass"] for r in own] == [r["pass"] for r in softmax] == [FORWARD, BOTH]
    for mine, theirs in zip(own, softmax, strict=True):
        assert mine["ratio"] == pytest.approx(mine["us"] / theirs["us"], rel=1e-3)
        assert (mine["against"], mine["met"]) == ("sdpa", True)


def test_log_normal_lengths_are_those_of_documents():
    found = cases.log_normal(65_536, 400, 1.2)
    assert sum(found) == 65_536
    assert min(found) >= 1
    assert 0.5 < math.log(max(found) / sorted(found)[len(found) // 2]) < 5
    assert found == cases.log_normal(65_536, 400, 1.2)  # the same in every run


def test_only_some_rows_are_measured(tmp_path):
    arguments = ["cases", "--quick", "--only", "^odd heads|IEEE", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = {r["case"] for r in Report.read(tmp_path / "cases-cpu.json").find("cases")}
    assert found == {"odd heads", "float32, IEEE"}


def test_what_the_host_costs_is_measured_on_a_gpu_for_all_that_is_wanted():
    assert SCALES["cuda"].host_rows == HOST_ROWS
    assert {row.kernel for row in HOST_ROWS} <= {p.name for p in peers.SDPA}
