import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib.image
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import find
from lightning_attention.bench.case import Case
from lightning_attention.bench.render import Figure
from lightning_attention.bench.report import Report

RESULTS = sorted((Path(find.__file__).parents[1] / "results").glob("*.json"))
WITH_A_FIGURE = next(path for path in RESULTS if path.stem == "h200-lengths")
CASES = ["cases", "constancy", "host", "lengths", "lrpe", "minimax", "numerics", "packed", "products", "scaling",
         "sequence_parallel", "serve", "serving", "shapes", "training"]  # fmt: skip


def test_a_case_is_a_file():
    assert find.case_names() == CASES
    for name in CASES:
        found = find.case(name)
        assert isinstance(found, Case)
        assert {"cpu", "cuda"} <= set(found.scales)  # what is measured on a GPU is tried on a CPU, small
        assert set(found.peers) <= {key for key, group in find.peers().items()
                                    if any(o in p.operations for p in group for o in found.operations)}  # fmt: skip


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_results_that_stand_are_shown(path, tmp_path, capsys):
    records = Report.read(path).records
    suites = Counter(r["suite"] for r in records)
    assert main(["--render", str(path), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    wrong = sum(r.get("relative_error") == "nan" for r in records)  # of a peer: it is shown as it is
    assert all(r["implementation"] == "linghe" for r in records if r.get("relative_error") == "nan")
    assert out.count("nan") == wrong
    rows = {"lengths": 8, "constancy": 20, "shapes": 7, "host": 5, "packed": 10, "serve": 13, "serving": 13,
            "minimax layer": 18, "minimax model": 4, "sequence parallelism": 3, "cases": 68, "lrpe": 2,
            "training": 1, "scaling": 4, "numerics": 105, "products": 18}  # fmt: skip
    shown = [r for name in suites if name in rows for r in [rows[name]]]
    tables = [line for line in out.splitlines() if line and set(line) == {"─"}]
    several = {"lengths": 2, "constancy": 2, "training": 3, "serving": 1 + any("ratio" in r for r in records),
               "host": 1 + any(r.get("pass") == "decode" for r in records)}  # fmt: skip
    assert len(tables) == sum(several.get(name, 1) for name in suites if name in rows)
    assert sum(bool(line) for line in out.splitlines()) >= sum(shown)
    drawn = {"lengths", "constancy", "shapes", "serve", "serving"} & set(suites)
    assert [p.name for p in tmp_path.iterdir()] == [f"{path.stem}.png"] * bool(drawn)
    if drawn:
        assert matplotlib.image.imread(tmp_path / f"{path.stem}.png").shape[1] > 1500


def test_the_results_have_a_figure_each_at_most():
    for path in RESULTS:
        report = Report.read(path)
        figures = [x for name in CASES for x in find.case(name).show(report) if isinstance(x, Figure)]
        assert len(figures) <= 1


def test_cases_are_measured_one_after_the_other(tmp_path, monkeypatch, capsys):
    packed = find.case("packed")
    monkeypatch.setitem(packed.scales, "cpu", type(packed.scales["cpu"])(64, (1,), 8, packed.scales["cpu"].dtype, 0.0))
    arguments = ["packed", "host", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["host-cpu.json", "packed-cpu.json"]
    command = Report.read(tmp_path / "host-cpu.json").environment["command"]
    assert command == " ".join(["python -m benchmarks", *arguments])  # not those of pytest
    assert "CPU time of an eager call" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("op",), "CASE is 'op'; it must be one of cases, "),
        (("host", "--threads", "0"), "--threads is 0; it must be at least 1"),
        (("host", "--backend", "x"), "--backend: backend is 'x'; it must be one of "),
        (("serving", "--peers", "sdpa"), "'sdpa' is not among cula, engines, fla, seg_la, vllm, vllm_layer"),
        (("serve", "--peers", "fla"), "'fla' cannot be compared with: serve has no peers"),
        (("shapes", "--peers", "seg_la"), "'seg_la' is not among cula, fla, lightning_attn, linghe, sdpa"),
        (("serving", "--backend", "tiled"), "--backend: serving has no such choice"),
        (("shapes", "--quick"), "--quick: shapes has no such choice"),
        (("shapes", "--only", "x"), "--only: shapes has no such choice"),
        (("cases", "--only", "no such row"), "--only: 'no such row' is in none of the rows: main case: "),
        (("cases", "--only", "("), "--only: '(' is no regular expression: "),
        (("sequence_parallel",), "torchrun --nproc-per-node 2 -m benchmarks sequence_parallel"),
    ],
)
def test_bad_arguments_say_what_is_wanted(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--device", "cpu", "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_without_a_case_all_are_listed(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in CASES)


def test_torch_alone_is_enough(tmp_path):
    """Where a GPU is lent there may be no typer, rich, matplotlib or transformers."""
    missing = ["typer", "rich", "matplotlib", "transformers", "numpy"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
from benchmarks.__main__ import main
main(["--render", {str(WITH_A_FIGURE)!r}, "--out", {str(tmp_path)!r}])
main(["host", "--device", "cpu", "--threads", "1", "--out", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(find.__file__).parents[2],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "figure   not drawn: matplotlib is not installed" in done.stdout
    assert "softmax attention" in done.stdout


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["host", "--out", str(tmp_path / "file" / "folder")])
    assert f"Not a directory: {tmp_path / 'file' / 'folder'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [None, "no JSON", "[]", '{"records": []}', '{"environment": null, "records": []}',
     '{"environment": {}, "records": {}}', '{"environment": {}, "records": [1]}',
     '{"environment": {}, "records": [{"ms": 1.0}]}'],
)  # fmt: skip
def test_what_is_no_record_is_named(content, tmp_path, capsys):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as left:
        main(["--render", str(path)])
    assert left.value.code == 2
    assert f"--render: {path} is no record of a benchmark: " in capsys.readouterr().err


def test_a_record_without_what_a_case_shows_is_named(tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text('{"environment": {"device": "x"}, "records": [{"suite": "shapes"}]}')
    with pytest.raises(SystemExit, match="2"):
        main(["--render", str(path), "--out", str(tmp_path)])
    assert f"--render: {path} lacks 'implementation' in what shapes shows" in capsys.readouterr().err
