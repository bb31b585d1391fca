import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.training.config import InputError, make_config
from lightning_attention.training.data import Windows, discard_data, prepare_data, validation_batches
from lightning_attention.training.tokenizer import END_ID


@given(n=st.integers(2, 200), seq_len=st.integers(2, 50), per_step=st.integers(1, 7), seed=st.integers(0, 3))
def test_windows_of_an_epoch_are_disjoint_and_contiguous(n, seq_len, per_step, seed):
    n = max(n, seq_len)
    windows = Windows(np.arange(n, dtype=np.uint16), seq_len, per_step, seed)
    steps = math.ceil(2 * windows.per_epoch / per_step)
    rows = torch.cat([windows.step(step) for step in range(steps)])
    assert rows.dtype == torch.int64
    assert torch.equal(rows - rows[:, :1], torch.arange(seq_len).expand_as(rows))
    for epoch in rows[: 2 * windows.per_epoch].split(windows.per_epoch):
        assert epoch.unique().numel() == windows.per_epoch * seq_len
        assert 0 <= epoch.min() <= epoch.max() < n


def test_windows_depend_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    one, other = Windows(tokens, 16, 4, seed=1), Windows(tokens, 16, 4, seed=1)
    in_order = [one.step(step) for step in range(40)]
    backwards = [other.step(step) for step in reversed(range(40))][::-1]
    assert all(map(torch.equal, in_order, backwards))
    assert not torch.equal(Windows(tokens, 16, 4, seed=2).step(0), in_order[0])
    # The second epoch cuts the text at other places than the first.
    starts = torch.cat(in_order)[:, 0]
    assert len({int(start) % 16 for start in starts[: 2 * one.per_epoch]}) == 2


@given(n=st.integers(1, 60), seq_len=st.integers(2, 20), batch=st.integers(1, 4), limit=st.integers(0, 70))
def test_validation_predicts_every_token_once(n, seq_len, batch, limit):
    tokens = np.arange(100, 100 + n, dtype=np.uint16)
    batches = list(validation_batches(tokens, seq_len, batch, limit))
    assert all(b.shape[0] <= batch and b.shape[1] <= seq_len for b in batches)
    predicted = torch.cat([b[:, 1:].flatten() for b in batches])
    assert predicted.tolist() == tokens[: limit or n].tolist()
    # What stands before a token in its window is what stands before it in the text.
    before = torch.cat([b[:, :-1].flatten() for b in batches])
    assert before.tolist() == [END_ID, *tokens[: limit or n].tolist()][:-1]


def test_prepared_data_is_the_text_and_its_last_tenth(tmp_path):
    lines = [f"line {i} of the text\n" for i in range(500)]
    (tmp_path / "a.txt").write_text("".join(lines[:300]))
    (tmp_path / "b.txt").write_text("".join(lines[300:]) + "zq" * 50)
    config = make_config({"inputs": [str(tmp_path / "*.txt")], "vocab_size": 400, "seq_len": 8})
    data = prepare_data(config, tmp_path / "tokens")
    text = "".join(lines) + "zq" * 50
    cut = len(text) - len(text) // 10
    decode = data.tokenizer.decode
    assert decode(data.train.tolist()) + decode(data.val.tolist()) == text
    assert abs(len(decode(data.train.tolist())) - cut) <= 1
    assert data.count_bytes(torch.from_numpy(data.val.astype(np.int64))) == len(decode(data.val.tolist()))
    # One end of document lies inside the training part, the other at the very end.
    assert (data.train == END_ID).sum() == 1
    assert data.val[-1] == END_ID
    # The tokenizer has not seen the held-out text.
    assert "zq" not in data.tokenizer.get_vocab()
    assert "line" in data.tokenizer.get_vocab()


def test_bits_per_byte_of_a_uniform_code(tmp_path):
    (tmp_path / "a.txt").write_text("some text to hold " * 40)
    config = make_config({"inputs": [str(tmp_path / "a.txt")], "vocab_size": 258, "seq_len": 8})
    data = prepare_data(config, tmp_path / "tokens")
    tokens = torch.from_numpy(data.val[:-1].astype(np.int64))
    assert data.bits_per_byte(len(tokens) * math.log(256), tokens) == pytest.approx(8.0)


def test_too_long_windows(tmp_path):
    (tmp_path / "a.txt").write_text("abc def ghi " * 10)
    config = make_config({"inputs": [str(tmp_path / "a.txt")], "seq_len": 512})
    with pytest.raises(InputError, match=r"seq_len is 512, but the training text has only \d+ tokens"):
        prepare_data(config, tmp_path / "tokens")


def test_discards_only_its_own_files(tmp_path):
    mine = tmp_path / "tokens"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="was not made by training"):
        discard_data(mine)
    assert (mine / "thesis.txt").exists()
