import json
from dataclasses import replace

import pytest
import torch

from lightning_attention.bench import case
from lightning_attention.bench.case import Case, OptionError, Run
from lightning_attention.bench.peers import OURS, Peer
from lightning_attention.bench.render import Table

ADD = "add"  # a toy operation
KNOWN = {
    "one": (Peer("one", "One", "torch", {ADD: lambda: 1}),),
    "two": (Peer("two_cpu", "Two", "none", {ADD: lambda: 2}, devices=("cpu",)),
            Peer("two_cuda", "Two", "none", {ADD: lambda: 2}, devices=("cuda",))),
    "other": (Peer("other", "Other", "torch", {"subtract": lambda: 1}),),
}  # fmt: skip


def measure(run: Run) -> None:
    for p in run.peers:
        run.report.add("toy", implementation=p.name, ms=run.scale)
    run.report.add("toy", implementation=OURS, **({"error": "wrong"} if run.scale < 0 else {"ms": run.scale}))


def show(report):
    yield Table("toys", ["who"], [[r["implementation"]] for r in report.find("toy")])
    yield "one sentence"


TOY = Case(measure, show, {"cpu": 3, "cpu quick": 1}, operations=(ADD,), peers=("one",))


@pytest.fixture
def carry_out(cpu, tmp_path):
    return lambda toy=TOY, **options: case.run(toy, "toy", cpu, known_peers=KNOWN, out=tmp_path / "out", **options)


def test_a_run_measures_writes_and_shows(carry_out, tmp_path, capsys):
    assert carry_out() == []
    content = json.loads((tmp_path / "out" / "toy-cpu.json").read_text())
    assert [(r["implementation"], r["ms"]) for r in content["records"]] == [("one", 3), (OURS, 3)]
    out = capsys.readouterr().out
    assert "one\nlightning_attention\n" in out
    assert "one sentence\n" in out
    assert "toy-cpu.json" in out


def test_peers_are_those_of_the_device_and_none_if_so_named(carry_out, tmp_path):
    for names, wanted in (("two, one", ["two_cpu", "one", OURS]), ("", [OURS])):
        carry_out(peers=names)
        content = json.loads((tmp_path / "out" / "toy-cpu.json").read_text())
        assert [r["implementation"] for r in content["records"]] == wanted


def test_our_own_failures_come_back(carry_out, capsys):
    (failure,) = carry_out(replace(TOY, scales={"cpu": -1}))
    assert failure["error"] == "wrong"
    assert "our own call failed: wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "options", "option", "message"),
    [
        ({}, {"peers": "three"}, "--peers", "'three' is not among one, two"),
        ({}, {"peers": "other"}, "--peers", "'other' is not among one, two"),
        (
            {"operations": (), "peers": ()},
            {"peers": "one"},
            "--peers",
            "cannot be compared with: toy has no peers",
        ),
        ({}, {"backend": "tiled"}, "--backend", "toy has no such choice"),
        ({"scales": {"cpu": 1}}, {"quick": True}, "--quick", "toy has no such choice"),
        ({"scales": {"cuda": 1}}, {}, "--device", "toy has no such choice"),
        ({"needs": ("torch", "no_such_package")}, {}, "case", "toy needs no_such_package, which is not installed"),
        ({"ranks": True}, {}, "case", "toy wants several processes: torchrun --nproc-per-node 2 -m benchmarks toy"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_written(
    carry_out, changed, options, option, message, tmp_path, monkeypatch
):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OptionError, match=message) as caught:
        carry_out(replace(TOY, **changed), **options)
    assert caught.value.option == option
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_the_first_reports(carry_out, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert carry_out(replace(TOY, ranks=True)) == []
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_missing_matplotlib_leaves_the_figure_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(case, "find_spec", lambda name: None if name == "matplotlib" else 1)
    case.show([case.Figure("x", [], ""), "the rest"], tmp_path / "x.png")
    assert capsys.readouterr().out == "figure   not drawn: matplotlib is not installed\nthe rest\n"


def test_a_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert case.find_device(None) == torch.device("cpu")
    with pytest.raises(OptionError, match="PyTorch sees no GPU here"):
        case.find_device("cuda")
