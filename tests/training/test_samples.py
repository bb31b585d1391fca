import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lightning_attention.cli.train import _with_samples
from lightning_attention.training.config import make_config
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.progress import Progress
from lightning_attention.training.samples import Samples, greedy
from lightning_attention.training.schedule import Schedule
from lightning_attention.training.tokenizer import END_ID
from lightning_attention.training.trainer import Trainer
from tests.support.tokenizers import metaspace
from tests.training.tiny import tiny_settings, train

TOKENS = 8


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("lightning_attention.training.samples.TOKENS", TOKENS)


def samples(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trainer.folder.samples.read_text().splitlines()]


def lines_without_time(trainer: Trainer) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(trainer.folder.metrics)]


def test_a_space_before_the_first_new_word_stays(monkeypatch):
    """Tokenizers as Llama's leave it out where a text begins."""
    tokenizer = metaspace()
    new = tokenizer.encode("of the", add_special_tokens=False)
    assert tokenizer.decode(new) == "of the"
    monkeypatch.setattr("lightning_attention.training.samples.greedy", lambda *_, **__: new)
    config = make_config({"sample_every": 1, "sample_prompt": "the of"})
    assert Samples(config, Schedule(config, 1), tokenizer).take(None) == " of the"


def test_samples_change_no_bit_of_the_run(tmp_path):
    plain, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "plain")))
    sampled, _ = train(tiny_settings(tmp_path, sample_every=1, sample_prompt="the state"))
    assert lines_without_time(sampled) == lines_without_time(plain)
    for ours, theirs in zip(sampled.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    states = [trainer.learner.runtime.rng_state()["cpu"] for trainer in (sampled, plain)]
    assert torch.equal(*states)
    assert sampled.model.training
    assert not plain.folder.samples.exists()


def test_a_sample_is_what_the_model_finds_likeliest(tmp_path):
    seen: list[Progress] = []
    settings = tiny_settings(tmp_path, steps=60, batch_size=4, sample_every=40, sample_prompt="漢字 <|endoftext|>")
    trainer = Trainer(make_config(settings))
    trainer.fit(seen.append)
    first, last = samples(trainer)
    assert (first["step"], last["step"]) == (40, 60)  # and after the last step
    assert {p.step: p.sample for p in seen if p.sample is not None} == {
        40: "漢字 <|endoftext|>" + first["text"], 60: "漢字 <|endoftext|>" + last["text"],
    }  # fmt: skip
    tokenizer = trainer._tokenizer
    ids = tokenizer.encode("漢字 <|endoftext|>", split_special_tokens=True)
    assert END_ID not in ids  # it is text
    new: list[int] = []
    with torch.no_grad():
        while len(new) < TOKENS:
            token = int(trainer.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            if token == END_ID:
                break
            new.append(token)
    assert len(new) > 3
    assert last["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert last["text"] != first["text"]
    assert greedy(trainer.learner, ids, 3, end=END_ID) == new[:3]
    other = next(token for token in new if token != new[0])
    assert greedy(trainer.learner, ids, TOKENS, end=other) == new[: new.index(other)]


def test_an_empty_prompt_begins_a_document(tmp_path):
    trainer, _ = train(tiny_settings(tmp_path, steps=2, sample_every=2))
    new = greedy(trainer.learner, [END_ID], TOKENS, end=END_ID)
    assert samples(trainer)[0]["text"] == trainer._tokenizer.decode(new, skip_special_tokens=True)


def test_samples_go_on_over_a_resume(tmp_path):
    settings = tiny_settings(tmp_path, sample_every=1, save_every=2)
    whole, _ = train({**settings, "out": str(tmp_path / "whole")})

    def die(progress: Progress) -> None:
        if progress.step == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        Trainer(make_config(settings)).fit(die)
    resumed, _ = train(settings, resume=True)
    assert resumed.resumed_from.name == "step_00000002"
    assert samples(resumed) == samples(whole)
    # A resumed run without samples keeps those before; a new one has none.
    Trainer(make_config(settings), overwrite=True).fit(
        lambda progress: progress.step == 3 and os.kill(os.getpid(), signal.SIGTERM)
    )
    kept, _ = train({**settings, "sample_every": 0}, resume=True)
    assert samples(kept) == samples(whole)[:3]
    anew, _ = train({**settings, "sample_every": 0}, overwrite=True)
    assert not anew.folder.samples.exists()


def test_a_sample_is_one_line_that_commands_no_terminal(tmp_path: Path):
    with (tmp_path / "out").open("w+", encoding="utf-8") as file:
        seen: list[Progress] = []
        console = Console(file=file, highlight=False, soft_wrap=True, markup=False)
        report = _with_samples(console, seen.append)
        report(Progress(7, 9, True, None, None, None, sample="one\n\x1b[2Jtwo [bold]" + 100 * "."))
        report(Progress(8, 9, True, None, None, None))
        file.seek(0)
        assert file.read() == f"sample after step 7: one  [2Jtwo [bold]{100 * '.'}\n"
    assert [progress.step for progress in seen] == [7, 8]
