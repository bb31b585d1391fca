import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.harness import find
from benchmarks.records import RESULTS, STEPS, Step, main
from lightning_attention.bench.report import Report

ROOT = RESULTS.parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
NAMED = re.compile(r"\b((?:h200|cpu)-[\w-]+)\.json\b")
SEVERAL = {"h200-training"}  # records of more than one step
OLDER = {"h200-minimax", "h200-training"}  # made before there were steps, by commands of the time


def chosen(step: Step) -> list[str]:
    """The rows that the step asks for."""
    words = shlex.split(step.arguments)
    case = find.case(words[0])
    return [row for row in case.rows(case.scales["cuda"]) if re.search(words[words.index("--only") + 1], row)]


def test_every_record_is_made_by_one_step():
    made = [step.record for step in STEPS.values()]
    assert set(made) == {path.stem for path in RESULTS.glob("*.json")}
    assert {record for record in made if made.count(record) > 1} == SEVERAL


def test_every_record_that_a_page_names_is_made():
    named = {name: path.name for path in DOCUMENTS for name in NAMED.findall(path.read_text(encoding="utf-8"))}
    assert {"h200-training", "h200-numerics", "h200-shapes"} <= set(named)
    assert {name: page for name, page in named.items() if name not in {step.record for step in STEPS.values()}} == {}


def test_a_step_is_a_command_that_there_is_and_takes_less_than_nine_minutes():
    for step in STEPS.values():
        assert 0 < step.seconds < 540
        if step.module == "benchmarks":
            cases = [w for w in shlex.split(step.arguments) if w in find.case_names()]
            assert cases
            assert all(find.case(name).ranks == (step.gpus > 1) for name in cases)
        recorded = Report.read(RESULTS / f"{step.record}.json").environment
        assert recorded["device_type"] == "cuda"


def test_a_record_was_made_by_its_step():
    made = {step.record: Report.read(RESULTS / f"{step.record}.json").environment["command"] for step in STEPS.values()}
    assert {step.record for step in STEPS.values() if made[step.record] != step.command} == OLDER


@pytest.mark.parametrize("record", ["h200-training", "h200-scaling"])
def test_the_rows_of_a_record_are_each_measured_by_one_of_its_steps(record):
    rows = [row for step in STEPS.values() if step.record == record for row in chosen(step)]
    found = Report.read(RESULTS / f"{record}.json").records
    names = {r["row"] if "row" in r else f"{r['size']} {r['model']} {r['T']}" for r in found} - {"rates"}
    assert sorted(rows) == sorted(names)


def test_all_are_listed(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    for name, step in STEPS.items():
        assert f"  {name} " in out
        assert step.command in out
    assert "h200-scaling.json, about 300 s on 2 GPUs" in out


@pytest.fixture
def two_steps(monkeypatch) -> Path:
    """Steps that a CPU does in a moment."""
    small = "--device cpu --threads 1"
    steps = {"one": Step("cpu-host", f"host {small}", 5), "other": Step("cpu-host", f"lrpe {small}", 5)}
    monkeypatch.setattr(records, "STEPS", steps)


@pytest.mark.usefixtures("two_steps")
def test_steps_are_run_and_joined_and_replace_a_record_where_that_is_asked_for(tmp_path, monkeypatch):
    repository = tmp_path / "results"
    repository.mkdir()
    monkeypatch.setattr(records, "RESULTS", repository)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    assert main(["one", "--out", str(out)]) == 0
    first = Report.read(out / "cpu-host.json")
    assert first.environment["command"] == "python -m benchmarks host --device cpu --threads 1"
    assert {r["suite"] for r in first.records} == {"host"}
    assert main(["other", "--out", str(out)]) == 0
    both = Report.read(out / "cpu-host.json")
    assert both.records[: len(first.records)] == first.records
    assert {r["suite"] for r in both.records} == {"host", "lrpe"}
    assert both.environment["command"].endswith("; python -m benchmarks lrpe --device cpu --threads 1")
    assert both.environment["commit"] == first.environment["commit"]
    assert list(repository.iterdir()) == []
    assert main(["one", "--out", str(out), "--replace"]) == 0
    assert [path.name for path in repository.iterdir()] == ["cpu-host.json"]
    assert Report.read(repository / "cpu-host.json").records == both.records


@pytest.mark.usefixtures("two_steps")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no such",), "STEP is 'no such'; it must be one of one, other"),
        (("one", "--out", str(RESULTS)), "--out is benchmarks/results"),
        (("one", "--out", "nowhere", "--replace"), "nowhere has nothing of cpu-host"),
    ],
)
def test_bad_arguments_say_what_is_wanted(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def part(out: Path, step: str, **environment: str) -> None:
    """What a step may have left."""
    path = out / "parts" / step / "part.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"environment": {"date": "", "command": "", "commit": ""} | environment, "records": []}))
    (path.parent / records.FINISHED).touch()


@pytest.mark.parametrize(
    ("device", "steps", "message"),
    [
        (("cuda", "NVIDIA H200"), ["training-385M", "training-3B"], "training-1B did not end, or failed"),
        (("cpu", "AMD EPYC"), ["training-385M", "training-1B", "training-3B"], "measured on cpu AMD EPYC"),
        (("cuda", "NVIDIA A100"), ["training-385M", "training-1B", "training-3B"], "measured on cuda NVIDIA A100"),
    ],
)
def test_a_part_of_a_record_or_one_of_another_device_replaces_none(
    tmp_path, monkeypatch, capsys, device, steps, message
):
    repository = tmp_path / "results"
    repository.mkdir()
    monkeypatch.setattr(records, "RESULTS", repository)
    for step in steps:
        part(tmp_path, step, device_type=device[0], device=device[1])
    with pytest.raises(SystemExit):
        main(["training-385M", "--out", str(tmp_path), "--replace"])
    assert message in capsys.readouterr().err
    assert list(repository.iterdir()) == []


def test_the_steps_after_one_that_fails_are_run(tmp_path, monkeypatch, capfd):
    steps = {"bad": Step("cpu-lrpe", "lrpe --device nowhere", 5), "good": Step("cpu-host", "host --device cpu", 5)}
    monkeypatch.setattr(records, "STEPS", steps)
    monkeypatch.chdir(ROOT)
    assert main(["bad", "good", "--out", str(tmp_path)]) == 2
    assert "failed   bad, with exit status 2" in capfd.readouterr().out
    assert [path.name for path in tmp_path.glob("*.json")] == ["cpu-host.json"]


def test_a_step_that_was_cut_short_replaces_nothing(tmp_path, monkeypatch, capsys):
    """Its record stands, for it is written again after each measurement."""
    repository = tmp_path / "results"
    repository.mkdir()
    monkeypatch.setattr(records, "RESULTS", repository)
    part(tmp_path, "shapes", device_type="cuda", device="NVIDIA H200")

    def killed(command, check):
        return subprocess.CompletedProcess(command, -9)

    monkeypatch.setattr(records.subprocess, "run", killed)
    assert main(["shapes", "--out", str(tmp_path)]) == -9
    with pytest.raises(SystemExit):
        main(["shapes", "--out", str(tmp_path), "--replace"])
    assert "h200-shapes is not whole" in capsys.readouterr().err
    assert list(repository.iterdir()) == []


@pytest.mark.usefixtures("two_steps")
def test_parts_of_different_devices_are_not_joined(tmp_path, capsys):
    for name, device in (("one", "A"), ("other", "B")):
        part(tmp_path, name, device=device, device_type="cuda")
    with pytest.raises(SystemExit):
        main(["one", "--out", str(tmp_path), "--replace"])
    assert "cpu-host was measured on A and B" in capsys.readouterr().err


@pytest.mark.usefixtures("two_steps")
def test_a_part_that_does_not_say_where_it_was_measured_is_named(tmp_path, capsys):
    part(tmp_path, "one")
    with pytest.raises(SystemExit):
        main(["one", "--out", str(tmp_path), "--replace"])
    assert "part.json does not say in its environment: device, device_type" in capsys.readouterr().err
