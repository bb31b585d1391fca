import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_attention.errors import DivergedError, InputError
from lightning_attention.training import checkpoint
from lightning_attention.training.config import make_config
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.tokenizer import END_ID
from lightning_attention.training.trainer import Trainer
from tests.training.tiny import tiny_settings, train


def losses(trainer: Trainer) -> list[tuple[int, float]]:
    return [(r["step"], r.get("loss", r.get("val_loss"))) for r in read_metrics(trainer.folder.root / "metrics.jsonl")]


def test_learns(tmp_path):
    _, outcome = train(tiny_settings(tmp_path, steps=60, eval_every=0, save_every=0, batch_size=4))
    first = read_metrics(outcome.metrics)[0]["val_bits_per_byte"]
    # Words drawn evenly from 11 of 6.3 bytes on average, with a space: 3.46 bits for 7.3 bytes, 0.5 bits per byte.
    assert first > 3
    assert 0.45 < outcome.held_out.bits_per_byte < 1.2
    assert outcome.held_out.step == 60
    assert outcome.step == 60
    assert outcome.stopped_by is None
    assert outcome.plot.read_bytes().startswith(b"\x89PNG")


def test_metrics_lines(tmp_path):
    trainer, outcome = train(tiny_settings(tmp_path, log_every=4, eval_every=5))
    lines = read_metrics(outcome.metrics)
    assert [(line["step"], "loss" in line) for line in lines] == [
        (0, False),
        (4, True),
        (5, False),
        (6, True),
        (6, False),
    ]
    train_line, val_line = lines[1], lines[0]
    assert train_line["tokens"] == 4 * 2 * 24
    assert train_line["tokens_per_second"] > 0
    assert 0 < train_line["lr"] <= 1e-2
    assert math.isfinite(train_line["grad_norm"])
    assert val_line["val_loss"] == pytest.approx(math.log(trainer.data.vocab_size), rel=0.05)


def test_validation_loss_is_the_code_length_of_the_held_out_text(tmp_path):
    trainer, outcome = train(tiny_settings(tmp_path, eval_tokens=0))
    seq_len = trainer.config.seq_len
    stream = torch.tensor([END_ID, *trainer.data.val.tolist()])
    nats = 0.0
    for position in range(1, len(stream)):
        # Windows share one token, so token i is predicted from its window's start on.
        start = (position - 1) // (seq_len - 1) * (seq_len - 1)
        with torch.no_grad():
            logits = trainer.model(input_ids=stream[None, start:position], use_cache=False).logits[0, -1]
        nats -= float(logits.double().log_softmax(-1)[stream[position]])
    text_bytes = trainer.data.count_bytes(stream)
    assert outcome.held_out.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_any_moment_and_resumed_nothing_can_be_told_apart(tmp_path):
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.training.killed_runs", str(tmp_path)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    deaths = int(finished.stdout.split()[0])
    assert deaths > 30  # two checkpoints of seven files, each written, synced and named, are nearly as many


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_resumed_run_is_the_same_run(tmp_path, name):
    whole, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "whole")))
    before = signal.getsignal(signal.SIGINT)

    def interrupt(progress):
        if progress.step == 3:
            os.kill(os.getpid(), getattr(signal, name))

    settings = tiny_settings(tmp_path)
    outcome = Trainer(make_config(settings)).fit(interrupt)
    assert (outcome.step, outcome.stopped_by) == (3, name)
    assert outcome.checkpoint.is_dir()
    assert signal.getsignal(signal.SIGINT) is before
    resumed, outcome = train(settings, resume=True)
    assert resumed.resumed_from.name == "step_00000003"
    assert (outcome.step, outcome.stopped_by) == (6, None)
    assert losses(resumed) == losses(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def rates(trainer: Trainer) -> list[float]:
    return [r["lr"] for r in read_metrics(trainer.folder.metrics) if "lr" in r]


def test_wsd_goes_on_over_a_resume_and_a_longer_run_decays_later(tmp_path):
    settings = tiny_settings(tmp_path, steps=10, schedule="wsd", decay_fraction=0.4, final_lr=0.0, save_every=5)
    whole, _ = train({**settings, "out": str(tmp_path / "whole")})
    assert rates(whole) == pytest.approx([5e-3, *[1e-2] * 5, 7.5e-3, 5e-3, 2.5e-3, 0.0])
    Trainer(make_config(settings)).fit(lambda progress: progress.step == 8 and os.kill(os.getpid(), signal.SIGTERM))
    resumed, _ = train(settings, resume=True)
    assert losses(resumed) == losses(whole)
    assert rates(resumed) == rates(whole)
    # From before the decay, as a run of that length would have gone.
    first = {**settings, "out": str(tmp_path / "first")}
    Trainer(make_config(first)).fit(lambda progress: progress.step == 5 and os.kill(os.getpid(), signal.SIGTERM))
    longer, _ = train({**first, "steps": 15}, resume=True)
    alone, _ = train({**settings, "out": str(tmp_path / "alone"), "steps": 15})
    assert losses(longer) == losses(alone)


def test_wsd_follows_the_clock(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path, steps=None, max_minutes=1.0, warmup_steps=5, schedule="wsd", final_lr=0.0)
    monkeypatch.setattr("lightning_attention.training.schedule.steps_in_budget", lambda *_, **__: 10)
    trainer, outcome = train(settings)
    assert outcome.step == 10
    assert rates(trainer) == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1e-2, 1e-2, 1e-2, 5e-3, 0.0])


def test_a_signal_before_the_first_step(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path)
    trainer = Trainer(make_config(settings))
    validate = trainer._validate
    monkeypatch.setattr(trainer, "_validate", lambda: (os.kill(os.getpid(), signal.SIGTERM), validate()))
    assert trainer.fit().step == 0
    resumed, outcome = train(settings, resume=True)
    assert outcome.step == 6
    whole, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "whole")))
    assert losses(resumed) == losses(whole)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    settings = tiny_settings(tmp_path)
    _, outcome = train(settings)
    before = (outcome.metrics.read_text(), (outcome.checkpoint / "model.safetensors").stat().st_mtime_ns)
    _, again = train(settings, resume=True)
    assert again == outcome
    assert (outcome.metrics.read_text(), (outcome.checkpoint / "model.safetensors").stat().st_mtime_ns) == before


def test_resume_without_a_checkpoint_is_an_error_unless_it_is_auto(tmp_path):
    with pytest.raises(InputError, match=r"there is no checkpoint in .*; --auto-resume starts where none is"):
        Trainer(make_config(tiny_settings(tmp_path)), resume=True)
    assert not (tmp_path / "run").exists()
    trainer, outcome = train(tiny_settings(tmp_path), resume="auto")
    assert trainer.resumed_from is None
    assert outcome.step == 6
    trainer, _ = train(tiny_settings(tmp_path), resume="auto")
    assert trainer.resumed_from == outcome.checkpoint


def test_the_logged_loss_is_the_mean_over_the_steps_since_the_last_line(tmp_path):
    every, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "every")))
    some, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "some"), log_every=4))
    by_step = {r["step"]: r["loss"] for r in read_metrics(every.folder.root / "metrics.jsonl") if "loss" in r}
    lines = {record["step"]: record for record in read_metrics(some.folder.root / "metrics.jsonl") if "loss" in record}
    assert lines[4]["loss"] == pytest.approx(sum(by_step[step] for step in (1, 2, 3, 4)) / 4, rel=1e-6)
    assert lines[6]["loss"] == pytest.approx(sum(by_step[step] for step in (5, 6)) / 2, rel=1e-6)
    # The bits are those of all of the bytes that the steps read.
    nats = lines[4]["loss"] * 4 * 2 * 24
    text_bytes = sum(some.data.count_bytes(some._windows.step(step)) for step in range(4))
    assert lines[4]["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes)


def test_the_mean_goes_on_over_a_resume(tmp_path):
    settings = tiny_settings(tmp_path, log_every=4)
    whole, _ = train({**settings, "out": str(tmp_path / "whole")})
    Trainer(make_config(settings)).fit(lambda progress: progress.step == 2 and os.kill(os.getpid(), signal.SIGTERM))
    resumed, _ = train(settings, resume=True)
    assert losses(resumed) == losses(whole)


def test_the_held_out_loss_says_when_it_was_measured(tmp_path):
    settings = tiny_settings(tmp_path, eval_every=3)
    seen = []

    def stop_at_five(progress):
        seen.append((progress.step, progress.held_out.step, progress.logged))
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = Trainer(make_config(settings)).fit(stop_at_five)
    assert seen == [(1, 0, True), (2, 0, True), (3, 3, True), (4, 3, True), (5, 3, True)]
    assert (outcome.step, outcome.held_out.step) == (5, 3)
    assert Trainer(make_config(settings), resume=True).record.held_out == outcome.held_out


def test_a_folder_with_a_run_needs_a_word(tmp_path):
    settings = tiny_settings(tmp_path)
    train(settings)
    with pytest.raises(InputError, match="holds checkpoints; add --resume to go on or --overwrite"):
        Trainer(make_config(settings))
    with pytest.raises(InputError, match="seq_len is 24 in the checkpoint and 20 now"):
        Trainer(make_config({**settings, "seq_len": 20}), resume=True)
    trainer, _ = train({**settings, "seq_len": 20}, overwrite=True)
    assert trainer.resumed_from is None
    assert [path.name for path in checkpoint.checkpoints(trainer.folder.root / "checkpoints")] == [
        "step_00000004",
        "step_00000006",
    ]


def test_an_earlier_run_stays_until_the_new_one_can_begin(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path)
    _, outcome = train(settings)

    def too_large(*_):
        raise MemoryError("no room for the weights")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_attention.training.trainer.new_model", too_large)
        with pytest.raises(MemoryError):
            Trainer(make_config(settings), overwrite=True)
    _, again = train(settings, resume=True)
    assert again == outcome


def test_a_run_can_be_made_longer(tmp_path):
    settings = tiny_settings(tmp_path)
    train(settings)
    _, outcome = train({**settings, "steps": 8}, resume=True)
    assert outcome.step == 8


def test_damaged_and_foreign_files_are_refused(tmp_path):
    settings = tiny_settings(tmp_path)
    trainer, outcome = train(settings)
    manifest = trainer.folder.root / "tokens" / "token_files.json"
    original = manifest.read_text()
    manifest.write_text(json.dumps({"fingerprint": "other"}))
    with pytest.raises(InputError, match=r"are not those that .* was trained on"):
        Trainer(make_config(settings), resume=True)
    manifest.write_text(original)
    weights = outcome.checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load the model in ") as caught:
        Trainer(make_config(settings), resume=True)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_readable_optimizer_is_refused(tmp_path):
    settings = tiny_settings(tmp_path)
    _, outcome = train(settings)
    (shard,) = (outcome.checkpoint / "optimizer").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load the optimizer in ") as caught:
        Trainer(make_config(settings), resume=True)
    assert "\n" not in str(caught.value)
    shutil.rmtree(outcome.checkpoint / "optimizer")
    with pytest.raises(InputError, match="has no folder optimizer: another version of lightning-attention wrote it"):
        Trainer(make_config(settings), resume=True)


def test_a_weight_of_another_shape_is_refused(tmp_path):
    settings = tiny_settings(tmp_path)
    _, outcome = train(settings)
    weights = load_file(outcome.checkpoint / "model.safetensors")
    weights["model.layers.0.token_mixer.out_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, outcome.checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"out_proj.weight is \[2, 2\] in .*; it must be \[32, 32\]"):
        Trainer(make_config(settings), resume=True)
    del weights["model.layers.0.token_mixer.out_proj.weight"]
    save_file(weights, outcome.checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"has no weight model.layers.0.token_mixer.out_proj.weight"):
        Trainer(make_config(settings), resume=True)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_token_files_that_were_altered_are_noticed(tmp_path, name):
    settings = tiny_settings(tmp_path)
    trainer, _ = train(settings)
    file = trainer.folder.tokens / name
    raw = bytearray(file.read_bytes())
    at = raw.index(b"\n") if name == "tokenizer.json" else len(raw) // 2
    raw[at] ^= ord("\n") ^ ord(" ")  # white space in the JSON, or another token: no file becomes longer
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"the token files in .*tokens have been altered since the run began"):
        Trainer(make_config(settings), resume=True)


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    one, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "one"), batch_size=4))
    two, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "two"), batch_size=2, accumulate=2))
    half, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "half"), batch_size=2))
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-4)
    assert losses(half)[3][1] != pytest.approx(losses(one)[3][1], rel=1e-4)


def test_bf16_is_close_and_not_the_same(tmp_path):
    full, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "full"), precision="auto"))
    half, _ = train(tiny_settings(tmp_path, out=str(tmp_path / "half"), precision="bf16"))
    assert not full.learner.runtime.bf16
    assert losses(half) != losses(full)
    assert [loss for _, loss in losses(half)] == pytest.approx([loss for _, loss in losses(full)], rel=0.02)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_compiled_weights_keep_their_names(tmp_path, monkeypatch):
    calls = []

    def compile_eagerly(forward):
        calls.append(forward.__self__)
        return functools.partial(forward)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    settings = tiny_settings(tmp_path, compile=True)
    trainer, outcome = train(settings)
    assert calls == list(trainer.model.model.layers)
    assert set(AutoModelForCausalLM.from_pretrained(outcome.checkpoint).state_dict()) == set(trainer.model.state_dict())


def test_time_budget_makes_a_plan_after_the_warm_up_and_keeps_it_in_the_checkpoint(tmp_path):
    settings = tiny_settings(tmp_path, steps=None, max_minutes=1.0, warmup_steps=5, eval_every=0, save_every=6)
    seen = []

    def stop_at_seven(progress):
        seen.append(progress.planned_steps)
        if progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = Trainer(make_config(settings)).fit(stop_at_seven)
    assert seen[:4] == [None] * 4
    assert outcome.planned_steps == seen[-1] > 20  # a minute is long for these steps
    resumed = Trainer(make_config({**settings, "device": "cpu"}), resume=True)
    assert resumed.planned_steps == outcome.planned_steps
    assert resumed.record.seconds > 0


def test_time_budget_follows_what_steps_take(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path, steps=None, max_minutes=1.0, warmup_steps=5, log_every=2)
    plans = iter([20, 30, 9, 10])  # after steps 5, 6, 8 and 9, of which 9 is no logged one
    monkeypatch.setattr("lightning_attention.training.schedule.steps_in_budget", lambda *_, **__: next(plans))
    _, outcome = train(settings)
    assert outcome.step == 9
    assert next(plans) == 10
    recorded = [record["planned_steps"] for record in read_metrics(outcome.metrics) if "loss" in record]
    assert recorded == [None, None, 20, 30, 9]


def test_time_budget_is_about_kept(tmp_path):
    settings = tiny_settings(tmp_path, steps=None, max_minutes=2 / 60, warmup_steps=8, eval_every=0, save_every=0)
    _, outcome = train(settings)
    seconds = read_metrics(outcome.metrics)[-1]["seconds"]
    assert 0.5 < seconds < 8  # other processes may slow the steps down after they were timed


def test_a_warm_up_does_not_outlast_the_time_budget(tmp_path):
    settings = tiny_settings(tmp_path, steps=None, max_minutes=0.3 / 60, warmup_steps=1_000_000, save_every=0)
    began = time.perf_counter()
    _, outcome = train(settings)
    assert outcome.stopped_by is None
    assert time.perf_counter() - began < 30


def test_a_budget_or_a_number_of_steps_ends_with_the_epochs(tmp_path):
    by_steps, outcome = train(tiny_settings(tmp_path, out=str(tmp_path / "steps"), steps=10_000, max_epochs=0.3))
    expected = math.ceil(0.3 * (len(by_steps.data.train) // 24 - 1) / 2)
    assert outcome.step == outcome.planned_steps == expected > 6
    timed = {"steps": None, "max_minutes": 1.0, "warmup_steps": 5, "eval_every": 0, "save_every": 0}
    _, outcome = train(tiny_settings(tmp_path, out=str(tmp_path / "timed"), **timed, max_epochs=0.3))
    assert outcome.step == expected
    _, outcome = train(tiny_settings(tmp_path, max_epochs=1e308))
    assert outcome.step == 6


def test_divergence_stops_and_leaves_the_last_good_checkpoint(tmp_path):
    # Nothing is logged before the run has diverged: what is saved is looked at all the same.
    trainer = Trainer(make_config(tiny_settings(tmp_path, lr=1e30, steps=20, save_every=1, log_every=100, clip=0.0)))
    with pytest.raises(DivergedError, match=r"the (loss|gradient norm) is (nan|inf) at step \d+; try a lower lr than"):
        trainer.fit()
    found = checkpoint.checkpoints(trainer.folder.root / "checkpoints")
    assert int(found[-1].name[5:]) == trainer.step - 1
    assert all(p.isfinite().all() for p in AutoModelForCausalLM.from_pretrained(found[-1]).parameters())


def spoil_a_weight(monkeypatch, step: int, value: float) -> None:
    """Let the optimizer make a weight `value` in that step of its, whose loss and gradient are in order."""
    step_once = torch.optim.AdamW.step

    def spoil(self, *_):
        step_once(self)
        weights = self.param_groups[0]["params"][0]
        if self.state[weights]["step"] == step:
            weights.data.view(-1)[7] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)


def test_a_last_step_that_makes_nan_is_not_saved(tmp_path, monkeypatch):
    spoil_a_weight(monkeypatch, 3, math.nan)
    trainer = Trainer(make_config(tiny_settings(tmp_path, steps=3)))
    with pytest.raises(DivergedError, match=r"the held-out loss is nan at step 3; try a lower lr than 0\.01"):
        trainer.fit()
    assert [path.name for path in checkpoint.checkpoints(trainer.folder.checkpoints)] == ["step_00000002"]
    assert losses(trainer)[-1][0] == 3
    assert all(math.isfinite(loss) for _, loss in losses(trainer))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_not_saved(tmp_path, monkeypatch, value):
    spoil_a_weight(monkeypatch, 3, value)
    trainer = Trainer(make_config(tiny_settings(tmp_path, save_every=1, eval_every=0, log_every=100)))
    with pytest.raises(DivergedError, match=rf"the largest weight is {value} at step 3; try a lower lr"):
        trainer.fit()
    found = checkpoint.checkpoints(trainer.folder.checkpoints)
    assert [path.name for path in found] == ["step_00000001", "step_00000002"]


def test_a_checkpoint_is_a_hugging_face_folder(tmp_path):
    trainer, outcome = train(tiny_settings(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(outcome.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(outcome.checkpoint)
    ids = tokenizer("the state of 漢字", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    assert model.config.eos_token_id == tokenizer.eos_token_id == END_ID


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_who_may_read_a_checkpoint_may_read_its_weights(tmp_path):
    _, outcome = train(tiny_settings(tmp_path))
    assert len({path.stat().st_mode for path in outcome.checkpoint.rglob("*") if path.is_file()}) == 1


def test_refuses_devices_that_are_not_there(tmp_path):
    for device, message in (("cuda:99", "device cuda:99 is not there"), ("tpu", "device must be auto, cpu, cuda")):
        with pytest.raises(InputError, match=message):
            Trainer(make_config(tiny_settings(tmp_path, device=device)))
