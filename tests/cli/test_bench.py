import json
from dataclasses import replace

import matplotlib.image
import pytest
import torch
import typer
from typer.testing import CliRunner

import lightning_attention
from lightning_attention.bench import lengths
from lightning_attention.bench.attention import BOTH, FORWARD
from lightning_attention.cli.bench import bench


@pytest.fixture
def run(monkeypatch):
    """The command, with lengths that take no time."""
    tiny = replace(lengths.SCALES["cpu quick"], lengths=(64, 128), H=2, D=16, seconds=0.01)
    monkeypatch.setitem(lengths.SCALES, "cpu quick", tiny)
    app = typer.Typer()
    app.command()(bench)
    return lambda *arguments: CliRunner().invoke(app, ["--device", "cpu", *arguments])


def test_a_quick_run_leaves_tables_numbers_and_a_figure(run, tmp_path):
    result = run("--quick", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "forward, per token" in result.stdout
    assert "forward+backward, per token" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["op-lengths-cpu.json", "op-lengths-cpu.png"]

    content = json.loads((tmp_path / "op-lengths-cpu.json").read_text())
    assert content["environment"]["torch"] == torch.__version__
    found = [(r["T"], r["pass"], r["implementation"]) for r in content["records"]]
    assert found == [(T, p, i) for T in (64, 128) for p in (FORWARD, BOTH) for i in ("lightning_attention", "sdpa")]
    assert all(r["ms"] > 0 and r["bytes_per_token"] > 0 for r in content["records"])

    pixels = matplotlib.image.imread(tmp_path / "op-lengths-cpu.png")
    assert pixels.shape[1] > 1500
    assert len(set(map(tuple, pixels[::8, ::8, :3].reshape(-1, 3).tolist()))) > 10


def test_threads_are_set_and_written_down(run, tmp_path):
    before = torch.get_num_threads()
    try:
        result = run("--quick", "--threads", "3", "--out", str(tmp_path))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    environment = json.loads((tmp_path / "op-lengths-cpu.json").read_text())["environment"]
    assert environment["threads"] == 3
    assert environment["device"].endswith(", 3 threads")


def test_a_backend_is_named_and_the_peers_may_be_none(run, tmp_path):
    result = run("--quick", "--peers", "", "--backend", "tiled", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "op-lengths-cpu.json").read_text())
    assert {r["implementation"] for r in content["records"]} == {"lightning_attention:tiled"}


def test_a_failure_of_our_own_is_told_by_the_exit_status(run, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(lightning_attention, "lightning_attention", broken)
    result = run("--quick", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "our own call failed" in result.stdout
    content = json.loads((tmp_path / "op-lengths-cpu.json").read_text())
    assert sum(r.get("error") == "RuntimeError: no kernel image" for r in content["records"]) == 2
    assert sum(r["implementation"] == "sdpa" and "ms" in r for r in content["records"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve",), "other cases are in a checkout of the repository: python -m benchmarks serve"),
        (("minimax", "--quick"), "python -m benchmarks minimax"),
        (("--suite", "shapes"), "python -m benchmarks shapes"),
        (("--suite", "h200"), "'h200' is not measured by this command"),
        (("h200",), "python -m benchmarks --help"),
        (("--backend", "x"), "backend is 'x'; it must be one of"),
        (("op", "--suite", "shapes,host", "--peers", "fla"), "python -m benchmarks shapes host"),
        (("--peers", "fla"), "'fla' is not among sdpa; a checkout of the repository has more: python -m benchmarks"),
        (("--peers", "sdpa,flash"), "'flash' is not among sdpa"),
        (("--device", "cuda"), "PyTorch sees no GPU here"),
        (("--device", "gpu"), "'gpu' is not"),
        (("--threads", "0"), "Invalid value for '--threads'"),
    ],
)
def test_bad_arguments_say_what_is_wanted(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
