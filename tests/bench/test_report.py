import json
import subprocess
import sys

import torch

from lightning_attention import __version__
from lightning_attention.bench import report as reports
from lightning_attention.bench.peers import SDPA, Peer
from lightning_attention.bench.report import Report, environment, slug


def test_environment_says_what_it_takes_to_repeat_the_run(cpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lightning-attention", "bench", "op", "--out", "a b"])
    found = environment(cpu, [Peer("ours", "", "lightning-attention", {}), *SDPA])
    assert found["command"] == "lightning-attention bench op --out 'a b'"
    assert found["torch"] == torch.__version__
    assert found["lightning_attention"] == __version__
    assert found["device_type"] == "cpu"
    assert found["device"].endswith("1 thread")
    assert found["threads"] == 1
    assert found["driver"] is None
    assert found["peers"] == {"lightning-attention": __version__}
    json.dumps(found)
    assert environment(cpu, command=["python", "-m", "benchmarks", "a b"])["command"] == "python -m benchmarks 'a b'"


def test_commit_is_the_checkouts_and_marks_changes(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "report.py"
    source.write_text("1")
    monkeypatch.setattr(reports, "__file__", str(source))
    monkeypatch.setenv("GIT_COMMIT", "given")
    assert reports.commit() == "given"
    monkeypatch.delenv("GIT_COMMIT")
    assert reports.commit() is None  # not a checkout
    git("init")
    assert reports.commit() is None  # a checkout of something else: this file is not in it
    git("add", ".")
    git("commit", "-m", "first")
    assert reports.commit() == git("rev-parse", "HEAD")
    source.write_text("2")
    assert reports.commit() == git("rev-parse", "HEAD") + "+"
    monkeypatch.setenv("GIT_COMMIT", "given")
    assert reports.commit() == "given"  # a copy, with a repository of its own or none


def test_the_file_is_complete_after_every_record(tmp_path):
    report = Report(tmp_path / "deep" / "er" / "x.json", {"device": "none"})
    assert json.loads(report.path.read_text()) == {"environment": {"device": "none"}, "records": []}
    report.add("shapes", T=8, ms=1.23456789)
    report.add("shapes", T=16, error=float("nan"))
    content = json.loads(report.path.read_text(), parse_constant=lambda _: 1 / 0)  # strict: no bare NaN
    assert content["records"] == [
        {"suite": "shapes", "T": 8, "ms": 1.23457},
        {"suite": "shapes", "T": 16, "error": "nan"},
    ]
    assert [p.name for p in report.path.parent.iterdir()] == ["x.json"]


def test_find_selects_by_every_value(tmp_path):
    report = Report(tmp_path / "x.json", {})
    report.add("a", T=1, H=1)
    report.add("a", T=1, H=2)
    report.add("b", T=1, H=2)
    assert report.find("a", T=1, H=2) == [{"suite": "a", "T": 1, "H": 2}]


def test_slug(cpu, monkeypatch):
    assert slug(cpu) == "cpu"
    monkeypatch.setattr(reports, "device_name", lambda _: "NVIDIA H200")
    assert slug(torch.device("cuda")) == "nvidia-h200"


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    Report(tmp_path / "x.json", {}).add("a", T=1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    written = Report(tmp_path / "x.json", {})
    written.add("a", T=1)
    assert Report.read(written.path).records == written.records
