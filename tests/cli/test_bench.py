import json
from dataclasses import replace
from functools import partial

import matplotlib.image
import pytest
import torch
import typer
from typer.testing import CliRunner

import lightning_attention
from lightning_attention.bench import op, report, serving, serving_ops, suites, tables
from lightning_attention.bench.op import BOTH, FORWARD
from lightning_attention.cli.bench import bench


@pytest.fixture
def run(monkeypatch):
    """The command, with lengths that take no time."""
    tiny = replace(op.SWEEPS["cpu", True], lengths=(64, 128), H=2, D=16, seconds=0.01)
    monkeypatch.setitem(op.SWEEPS, ("cpu", True), tiny)
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


def test_a_missing_peer_does_not_stop_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fla", None)
    result = run("op", "--quick", "--peers", "fla", "--backend", "tiled", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "ModuleNotFoundError" in result.stdout
    assert "failed" in result.stdout


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


def test_serve_leaves_a_table_numbers_and_a_figure(run, tmp_path, monkeypatch):
    sizes = {"decoder_layers": 1, "decoder_embed_dim": 16, "decoder_attention_heads": 1, "glu_dim": 32, "vocab_size": 9}
    tiny = serving.Scale((1, 2), {1: (8, 16)}, 8, torch.float32, sizes, steps=1, windows=1)
    monkeypatch.setitem(serving.SCALES, ("cpu", True), tiny)
    result = run("serve", "--quick", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "generation, decode steps" in result.stdout
    assert "batch 1: a step takes " in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["serve-cpu.json", "serve-cpu.png"]
    content = json.loads((tmp_path / "serve-cpu.json").read_text())
    assert content["environment"]["transformers"]
    assert len(content["records"]) == 6


def test_the_serving_suite_leaves_a_table_numbers_and_a_figure(run, tmp_path, monkeypatch):
    tiny = serving_ops.Scale(2, 16, torch.float32, (1, 2), (("mixed", (9, 1), False),), (2, 2), seconds=0.001)
    monkeypatch.setitem(serving_ops.SCALES, "cpu", tiny)
    monkeypatch.setitem(__import__("sys").modules, "fla", None)
    result = run("--suite", "serving,lengths", "--quick", "--peers", "fla", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "Serving operations" in result.stdout
    assert "verify + commit: a decode call for each draft takes " in result.stdout
    content = json.loads((tmp_path / "op-serving-lengths-cpu.json").read_text())
    assert content["environment"]["peers"].keys() == {"fla", "flash-linear-attention"}
    assert {r["suite"] for r in content["records"]} == {"copy", "serving", "lengths"}
    assert (tmp_path / "op-serving-cpu.png").exists()


@pytest.mark.parametrize(
    ("arguments", "peers"),
    [
        (("--suite", "constancy"), []),
        (("--suite", "h200"), []),
        (("--suite", "h200", "--peers", "fla,sdpa"), []),
        (("--suite", "constancy", "--peers", "fla"), ["fla"]),
    ],
)
def test_constancy_has_peers_only_where_both_are_named(run, arguments, peers, tmp_path, monkeypatch):
    seen = {}

    def suite(name, report, implementations, *_):
        seen[name] = [i.name for i in implementations]

    for name in ("shapes", "host", "constancy"):
        monkeypatch.setattr(suites, name, partial(suite, name))
    monkeypatch.setattr(suites, "packed", lambda *_, **__: None)
    monkeypatch.setattr(tables, "of_suite", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # from here on nothing asks it for anything
    monkeypatch.setattr(report, "environment", lambda *_: {})
    monkeypatch.setattr(report, "slug", lambda _: "gpu")
    result = run("--device", "cuda", *arguments, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert seen["constancy"] == ["lightning_attention", *peers]
    if "h200" in arguments:
        assert len(seen["shapes"]) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--suite", "shapes"), "serve has no such choice"),
        (("serve", "--peers", "fla"), "serve has no such choice"),
        (("--suite", "h200"), "needs a GPU"),
        (("--suite", "serving,shapes"), "needs a GPU"),
        (("--suite", "serving", "--backend", "tiled"), "serving has no such choice"),
        (("--suite", "serving", "--peers", "sdpa"), "'sdpa' is not among seg_la, fla, vllm"),
        (("--suite", "speed"), "'speed' is not among lengths, h200"),
        (("--peers", "sdpa,flash"), "'flash' is not among fla, lightning_attn, sdpa"),
        (("train",), "'train' is not"),
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
