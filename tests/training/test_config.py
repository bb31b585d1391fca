from dataclasses import fields

import pytest

from lightning_attention.errors import InputError
from lightning_attention.training.config import TrainConfig, make_config, read_toml, resumed_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"width": 100, "heads": 3}, r"width must be a multiple of heads \(3\); got 100"),
        ({"model": "gpt2"}, "model must be one of transnormer, llama; got 'gpt2'"),
        ({"size": "2B"}, "size must be one of 75M, 385M, 1B, 3B, 7B; got '2B'"),
        ({"corpus": "web"}, "corpus must be one of pydoc, stdlib; got 'web'"),
        ({"precision": "fp8"}, "precision must be one of auto, bf16, float32"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"final_lr": 1.5}, "final_lr must be between 0 and 1"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"clip": -1.0}, "clip must be 0 or more"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 10**8}, "steps must be at most 99,999,999; got 100000000"),
        ({"inputs": ["a", ""]}, "inputs must be names of files or folders, none of them empty"),
        ({"out": ""}, "out must be the name of a file or folder, not empty"),
        ({"validation": ""}, "validation must be the name of a file or folder, not empty"),
        ({"max_minutes": 1e308}, r"max_minutes must be above 0, at most 10,000,000; got 1e\+308"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"max_epochs": float("inf")}, "max_epochs must be a finite number; got inf"),
        ({"max_minutes": float("inf")}, "max_minutes must be above 0, at most 10,000,000; got inf"),
        ({"lr": 10**400}, "lr must be a finite number; got inf"),
        ({"seed": 10**22}, r"seed must be below 2\^63; got 1"),
        ({"width": 1 << 21, "heads": 4}, "width must be at most 1,048,576"),
        ({"batch_size": 1 << 40}, r"batch_size must be smaller: a step would read 2\^31 tokens"),
        ({"out": "a\udcff"}, r"out is not Unicode text: '\\udcff' at character 1; was it typed or stored as UTF-8"),
        ({"inputs": ["a", "\ud800"]}, "inputs is not Unicode text"),
        ({"out": "a\0"}, "out must hold no zero character"),
        ({"encoding": "klingon"}, "encoding must be auto or the name of a text encoding, as cp1251; got 'klingon'"),
        ({"encoding": "base64"}, "encoding must be auto or the name of a text encoding"),
        ({"encoding": "é"}, "encoding must be auto or the name of a text encoding"),
        ({"validation": "a", "val_fraction": 0.1}, "val_fraction must be left out when validation is given"),
        ({"max_epochs": 0}, "max_epochs must be above 0"),
        ({"max_minutes": 0}, "max_minutes must be above 0"),
        ({"max_minutes": 1, "steps": 5}, "steps must be left out when max_minutes is given"),
        ({"max_minutes": 1, "warmup_steps": 4}, "warmup_steps must be at least 5 when max_minutes is given"),
        ({"schedule": "linear"}, "schedule must be one of cosine, wsd; got 'linear'"),
        ({"decay_fraction": 0.3}, "decay_fraction must be left out unless schedule is wsd; got 0.3"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, "decay_fraction must be above 0, at most 1; got 0.0"),
        ({"seq_len": "12"}, "seq_len must be of type int; got '12'"),
        ({"seq_len": True}, "seq_len must be of type int; got True"),
        ({"seq_len": None}, "seq_len must be of type int; got None"),
        ({"compile": 1}, "compile must be of type bool; got 1"),
        ({"inputs": "a.txt"}, "inputs must be a list of strings; got 'a.txt'"),
        ({"seqlen": 12}, "unknown setting 'seqlen'; did you mean seq_len?"),
        ({"seq-len": 12}, "unknown setting 'seq-len'; did you mean seq_len?"),
        ({"zzz": 12}, "unknown setting 'zzz'; the settings are inputs, "),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        make_config(settings)


def test_every_setting_has_a_group_and_help():
    for setting in fields(TrainConfig):
        assert setting.metadata["group"] in ("Data", "Model", "Optimisation", "Parallelism", "Run")
        assert setting.metadata["help"].endswith((".", "]", "..."))


def test_integers_stand_for_floats():
    config = make_config({"lr": 1, "max_minutes": 2})
    assert (config.lr, config.max_minutes) == (1.0, 2.0)
    assert isinstance(config.lr, float)


def test_toml_round_trip(tmp_path):
    names = ['a "quoted" name.txt', "b\\c", "é漢🙂.txt", "a\n\t\x01\x7fb"]
    config = make_config({"inputs": names, "lr": 1e-4, "compile": True, "max_minutes": 1.5})
    path = tmp_path / "config.toml"
    for encoding in ("utf-8", "utf-8-sig"):  # the second as Windows writes it
        path.write_text(config.as_toml(), encoding=encoding)
        assert make_config(read_toml(str(path))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq_len = ", "is not valid TOML"),
        ("learning_rate = 1", "unknown setting 'learning_rate'"),
        ("[data]\nseq_len = 5", "unknown setting 'data'"),
        ("lr = 'high'", "lr must be of type float; got 'high'"),
    ],
)
def test_refuses_bad_toml_and_names_the_file(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_toml(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_toml():
    with pytest.raises(InputError, match=r"cannot read the configuration nowhere.toml: No such file"):
        read_toml("nowhere.toml")


def test_resume_keeps_what_is_computed_and_changes_the_rest():
    stored = make_config({"lr": 0.5, "keep": 3}).as_dict()
    assert resumed_config(stored, make_config({})) == make_config(stored)
    assert resumed_config(stored, make_config({"lr": 0.5, "keep": 1, "steps": 9})).keep == 1
    with pytest.raises(InputError, match=r"lr is 0.5 in the checkpoint and 0.1 now"):
        resumed_config(stored, make_config({"lr": 0.1}))
    with pytest.raises(InputError, match="steps cannot be set"):
        resumed_config(make_config({"max_minutes": 1}).as_dict(), make_config({"steps": 9}))


def test_a_size_stands_for_the_shape():
    config = make_config({"size": "385m"})
    assert (config.size, config.layers, config.width, config.heads) == ("385M", 24, 1024, 8)
    assert (config.glu_dim, config.tie_embeddings) == (2816, False)
    assert make_config({"size": "385M", "model": "llama"}).glu_dim == 3200
    assert make_config({"size": "385M", "layers": 24}) == config  # no contradiction
    assert make_config({}).width == 256


@pytest.mark.parametrize(
    ("name", "value", "has"), [("layers", 4, 16), ("glu_dim", 100, 5632), ("tie_embeddings", True, False)]
)
def test_nothing_contradicts_a_size(name, value, has):
    message = f"{name} must be left out when size is 1B, which has {has}; got {value}"
    with pytest.raises(InputError, match=message):
        make_config({"size": "1B", name: value})


def test_the_file_of_a_run_of_one_size_takes_another(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(make_config({"size": "75M", "lr": 0.1}).as_toml())
    config = make_config({**read_toml(str(path)), "size": "1B"})
    assert (config.layers, config.lr) == (16, 0.1)
    stored = make_config({"size": "75M"}).as_dict()
    assert resumed_config(stored, make_config({"size": "75m", "heads": 5})) == make_config(stored)
    with pytest.raises(InputError, match="size is '75M' in the checkpoint and '1B' now"):
        resumed_config(stored, make_config({"size": "1B"}))
