"""Two models on the same text: how a learning rate is chosen, a run of each kind, and what is shown of both."""

import gzip
import json
import os
import random
import signal
from typing import Any

import pytest

from benchmarks import quality
from lightning_attention.bench.render import Figure, Table
from lightning_attention.bench.report import Report
from lightning_attention.models.presets import SIZES, Size
from lightning_attention.training.config import make_config
from lightning_attention.training.learner import Learner

pytest.importorskip("transformers")
from lightning_attention.training.tokenization import tokenize_texts


def chosen(loss):
    losses = {}
    while (rate := quality.next_rate(losses)) is not None:
        losses[rate] = loss(rate)
        assert len(losses) < 100
    return losses


def test_a_learning_rate_has_others_on_both_sides():
    assert chosen(lambda rate: abs(rate - 2e-3)).keys() == {1e-3, 2e-3, 4e-3}
    assert chosen(lambda rate: abs(rate - 5e-3)).keys() == {1e-3, 2e-3, 4e-3, 8e-3}
    assert chosen(lambda rate: rate).keys() == {1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4}  # and ends


def test_a_model_is_trained_and_read_in_longer_windows(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "TINY", Size(1, 32, 2, 48, 64, tie_embeddings=True))
    draw = random.Random(0)
    words = " ".join(draw.choices(("lightning", "attention", "state", "of", "the"), k=3000))
    text = tmp_path / "long.jsonl.gz"
    text.write_bytes(gzip.compress(json.dumps({"text": words}).encode()))
    tokens = tmp_path / "tokens"
    tokenize_texts(make_config({"inputs": [str(text)], "vocab_size": 300, "val_fraction": 0.2}), tokens)
    small = {"size": "tiny", "steps": 8, "seq-len": 16, "batch-size": 1, "eval-tokens": 32, "out": tmp_path}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert quality.main([str(tokens), str(text), *options]) == 0
    (path,) = tmp_path.glob("quality-transnormer-*.json")
    report = Report.read(path)
    assert len(report.find("rates")) >= 3
    assert [r["step"] for r in report.find("curve") if "held_out" in r] == list(range(9))
    assert report.find("position")[-1]["last"] == 63
    assert "learning rate" in capsys.readouterr().out
    whole = path.read_bytes()

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit):
            quality.main([*map(str, arguments), *options])
        assert path.read_bytes() == whole
        return capsys.readouterr().err

    assert "--overwrite replaces it" in refused(tokens, text)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "no such file" in refused(tokens, tmp_path / "absent.jsonl", "--overwrite")
    assert "there is no text" in refused(tokens, empty, "--overwrite")
    assert "is there already" not in refused(tmp_path / "no tokens", text, "--overwrite")

    step = Learner.step

    def stopped(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(Learner, "step", stopped)
    assert quality.main([str(tokens), str(text), *options, "--overwrite"]) == 143
    assert not Report.read(path).find("curve")  # rates took a step each, and ended
    with pytest.raises(SystemExit):
        quality.main(["--render", str(path), "--out", str(tmp_path)])
    assert "wanted is a file of each" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.main(["--render", str(text), "--out", str(tmp_path)])
    assert "is no record of a benchmark" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"environment": {"device": "an abacus"}, "records": []}))
    with pytest.raises(SystemExit):
        quality.main(["--render", str(path), str(other), "--out", str(tmp_path)])
    assert "compare those of one device" in capsys.readouterr().err


def test_both_models_are_shown(report, tmp_path):
    for model, better in (("transnormer", 0.1), ("llama", 0.0)):
        report.add("rates", model=model, lr=1e-3, steps=10, held_out=3.0)
        for step in range(1, 41):
            held_out = {"held_out": 3 - better} if step % 10 == 0 else {}
            report.add(
                "curve", model=model, step=step, tokens=1_000_000 * step, loss=5 - step / 20 - better, **held_out
            )
        report.add("long documents", model=model, lr=1e-3, weights=76_000_000, seq_len=4096, tokens=9, loss=2.5,
                   bits_per_byte=0.9)  # fmt: skip
        for first in (1, 2, 4):
            report.add("position", model=model, first=first, last=2 * first - 1, tokens=9, loss=4 - first / 4 - better)
    table, positions, figure = quality.shown(report)
    assert [type(x) for x in (table, positions, figure)] == [Table, Table, Figure]
    assert [row[:5] for row in table.rows] == [
        ["TransNormerLLM", "76.0 M", "40 M", "0.001", "2.9000"],
        ["Llama (softmax)", "76.0 M", "40 M", "0.001", "3.0000"],
    ]
    assert positions.rows[-1] == ["4 to 7", "2.9000", "3.0000"]
    held_out = {line.label: line.points for line in figure.panels[0].lines if line.label}
    assert held_out == {"TransNormerLLM": [(10 * i, 2.9) for i in (2, 3, 4)],
                        "Llama (softmax)": [(10 * i, 3.0) for i in (2, 3, 4)]}  # fmt: skip
    means = figure.panels[0].lines[0].points
    assert means[0] == (20, pytest.approx(5 - 15.5 / 20 - 0.1))
    pytest.importorskip("matplotlib")
    figure.save(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
