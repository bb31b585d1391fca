import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_attention.errors import InputError
from lightning_attention.training import checkpoint
from lightning_attention.training.config import make_config
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.trainer import Trainer
from tests.cli.test_train import flags
from tests.training.tiny import tiny_settings, train, write_text


@pytest.fixture
def tokens(run, tmp_path):
    """A folder of tokens, made by the command."""
    lines = write_text(tmp_path / "text.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    folder = tmp_path / "tokens"
    command = ("tokenize", str(tmp_path / "a.jsonl"), "--out", str(folder), "--text-field", "body")
    status, out, err = run(*command, "--vocab-size", "310", "--val-fraction", "0.2")
    assert status == 0, err
    assert "read 1 file: 1 utf-8" in err
    about = json.loads((folder / "token_shards.json").read_text())
    assert about["vocab_size"] == 310
    assert 0.1 < about["val"]["documents"] / len(lines) < 0.3
    assert about["train"]["bytes"] + about["val"]["bytes"] == sum(len(line.encode()) for line in lines)
    for part, name in (("train", "to train on:"), ("val", "held out:   ")):
        assert f"{name} {about[part]['tokens']:,} tokens of {about[part]['documents']:,} documents" in out
    return folder


def settings_on(tokens, folder, **changes):
    settings = tiny_settings(folder, inputs=[str(tokens)], **changes)
    del settings["vocab_size"]
    return settings


def test_trains_in_place_and_goes_on_bit_for_bit(run, tmp_path, tokens):
    before = {path.name: path.stat().st_mtime_ns for path in tokens.iterdir()}
    settings = settings_on(tokens, tmp_path)
    whole, outcome = train(settings)
    assert whole.config.vocab_size == whole.data.vocab_size == 310
    assert sorted(path.name for path in whole.folder.tokens.iterdir()) == ["files.json", "token_files.json"]
    checkpoint.remove_folder(outcome.checkpoint)
    status, _, err = run("train", *flags(settings), "--resume")
    assert status == 0, err
    assert "going on from" in err
    assert "step_00000004" in err
    again = AutoModelForCausalLM.from_pretrained(outcome.checkpoint)
    assert all(map(torch.equal, whole.model.parameters(), again.parameters()))
    assert {path.name: path.stat().st_mtime_ns for path in tokens.iterdir()} == before
    # What a run wrote of its settings can be used again.
    status, _, err = run("train", "--config", str(tmp_path / "run" / "config.toml"), "--out", str(tmp_path / "again"))
    assert status == 0, err


def test_bytes_are_those_of_the_text(tmp_path, tokens):
    trainer, outcome = train(settings_on(tokens, tmp_path))
    line = read_metrics(outcome.metrics)[0]
    text = "".join(trainer.data.tokenizer.decode(trainer.data.val[:].tolist()))
    predicted = len(trainer.data.val)
    assert line["val_bits_per_byte"] == pytest.approx(
        line["val_loss"] * predicted / math.log(2) / len(text.encode()), rel=1e-6
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["more"], "tokens holds tokens, not text; `train` takes such a folder as its only INPUT"),
        (["--vocab-size", "2048"], r"vocab_size is 2048, but the tokens in .*tokens are of 310"),
        (["--validation", "more"], r"validation is 'more', but .*tokens holds tokens, not text: give it to `tokenize`"),
        (["--val-fraction", "0.3"], "val_fraction is 0.3, but "),
        (["--seq-len", "9999"], "seq_len is 9999, but the training text has only "),
    ],
)
def test_settings_that_contradict_the_tokens(run, tmp_path, tokens, extra, message):
    write_text(tmp_path / "more")
    extra = [str(tmp_path / part) if part == "more" else part for part in extra]
    status, _, err = run("train", str(tokens), *extra, "--out", str(tmp_path / "run"))
    assert status == 2
    assert re.search(message.replace("'more'", "'.*more'"), err)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_tokens_that_were_altered_or_moved_are_noticed(tmp_path, tokens):
    settings = settings_on(tokens, tmp_path)
    train(settings)

    def message():
        with pytest.raises(InputError) as caught:
            Trainer(make_config(settings), resume=True)
        return str(caught.value)

    shard = tokens / "val-00000.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw + b"\0\0")
    assert "val-00000.bin has " in message()
    shard.write_bytes(raw)
    tokens.rename(tmp_path / "elsewhere")
    assert f"cannot open the tokens in {tokens}: " in message()


def test_another_tokenizer_and_its_end_of_text(run, tmp_path, tokens):
    """One whose end of text is not token 1, and which pads with nothing: in the model and in what is saved of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate([*alphabet, "</s>"])} | {"ab": 300}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "other.json"))
    folder = tmp_path / "others"
    command = ("tokenize", str(tmp_path / "a.jsonl"), "--text-field", "body", "--out", str(folder))
    status, _, err = run(*command, "--tokenizer", str(tmp_path / "other.json"))
    assert status == 0, err
    trainer, outcome = train(settings_on(folder, tmp_path))
    assert (trainer.data.end_id, trainer.data.pad_id, trainer.data.vocab_size) == (256, None, 301)
    model = AutoModelForCausalLM.from_pretrained(outcome.checkpoint)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.vocab_size) == (256, None, 301)
    assert AutoTokenizer.from_pretrained(outcome.checkpoint).eos_token_id == 256
    status, _, err = run("generate", "--model", str(tmp_path / "run"), "--max-tokens", "3", "the", "")
    assert status == 0, err

    status, _, err = run(*command, "--tokenizer", str(tmp_path / "other.json"), "--vocab-size", "300")
    assert (status, "give one of them" in err) == (2, True)


def test_a_full_disk_is_said(run, tmp_path, tokens, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_attention.training.shards.ShardWriter.append", full)
    command = ("tokenize", str(tmp_path / "a.jsonl"), "--text-field", "body", "--out", str(tmp_path / "b"))
    status, _, err = run(*command, "--tokenizer", str(tokens))
    assert status == 1
    assert f"error: cannot write {tmp_path / 'b'}: No space left on device" in err
    assert not (tmp_path / "b").exists()
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]
