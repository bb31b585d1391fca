import errno
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.errors import InputError
from lightning_attention.training.config import make_config
from lightning_attention.training.data import Windows, prepare_data, separate_documents, validation_batches
from lightning_attention.training.learner import Learner
from lightning_attention.training.metrics import MeanLoss
from lightning_attention.training.model import new_model
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.tokenizer import END_ID
from tests.training.tiny import write_text


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
def test_validation_predicts_tokens_once_and_spread_over_all_of_them(n, seq_len, batch, limit):
    tokens = np.arange(100, 100 + n, dtype=np.uint16)
    batches = list(validation_batches(tokens, seq_len, batch, limit))
    assert all(b.shape[0] <= batch and b.shape[1] <= seq_len for b in batches)
    predicted = torch.cat([b[:, 1:].flatten() for b in batches]).tolist()
    assert predicted == sorted(set(predicted))
    if not limit or limit >= n:
        assert predicted == tokens.tolist()
    else:
        window = min(seq_len - 1, limit)
        assert limit - window < len(predicted) <= limit
        # From end to end: no stretch as long as the part left out, and a window more, goes unseen.
        gaps = np.diff([100 - window, *predicted, 100 + n])
        assert gaps.max() <= window * (n // len(predicted) + 2)
    # What stands before a token in its window is what stands before it in the text.
    before = torch.cat([b[:, :-1].flatten() for b in batches]).tolist()
    assert before == [END_ID if token == 100 else token - 1 for token in predicted]


def lines_of(start, end):
    return [f"line {i} of the text\n" for i in range(start, end)]


def test_prepared_data_is_the_text_and_a_tenth_of_it_in_blocks(tmp_path):
    (tmp_path / "a.txt").write_text("".join(lines_of(0, 9000)))
    (tmp_path / "b.txt").write_text("".join(lines_of(9000, 10_000)) + "zq" * 50)
    config = make_config({"inputs": [str(tmp_path / "*.txt")], "vocab_size": 400, "seq_len": 8})
    said = []
    data = prepare_data(config, tmp_path / "tokens", said.append)
    assert said == ["read 2 files: 2 utf-8"]
    decode = data.tokenizer.decode
    train, val = (
        decode(part.tolist(), skip_special_tokens=False).split("<|endoftext|>") for part in (data.train, data.val)
    )
    assert train.pop() == val.pop() == ""  # each ends with the end of a text
    text = "".join(lines_of(0, 10_000)) + "zq" * 50
    assert len(val) == 5
    assert len(train) == 5 + 1  # one end of document lies inside the training part
    assert len("".join(val)) == pytest.approx(len(text) / 10, rel=0.02)
    # Held-out lines are in no other place, and nothing is lost.
    train_lines, val_lines = ("".join(part).splitlines() for part in (train, val))
    assert not {*train_lines} & {*val_lines}
    assert sorted(train_lines + val_lines) == sorted(text.splitlines())
    # A window that crosses from one part of the text to another sees that there is an end.
    assert all(part.endswith("\n") for part in train)
    assert data.count_bytes(torch.from_numpy(data.val.astype(np.int64))) == len("".join(val))
    # The tokenizer has not seen the held-out text, of which the last block is the end.
    assert "zq" not in data.tokenizer.get_vocab()
    assert "line" in data.tokenizer.get_vocab()
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [
        "files.json", "token_files.json", "tokenizer.json", "train.bin", "val.bin"
    ]  # fmt: skip


def test_a_text_to_validate_on_is_not_trained_on(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("".join(lines_of(0, 100)))
    (tmp_path / "train" / "copy.txt").write_text("".join(lines_of(200, 300)), encoding="utf-16")
    (tmp_path / "held.txt").write_text("".join(lines_of(200, 300)))
    config = make_config(
        {"inputs": [str(tmp_path / "train")], "validation": str(tmp_path / "held.txt"), "seq_len": 8, "vocab_size": 300}
    )
    said = []
    data = prepare_data(config, tmp_path / "tokens", said.append)
    assert data.tokenizer.decode(data.train.tolist()) == "".join(lines_of(0, 100))
    assert data.tokenizer.decode(data.val.tolist()) == "".join(lines_of(200, 300))
    assert any("left out 1, the same text as one before: " in line and "copy.txt" in line for line in said)


def test_special_tokens_in_a_text_are_text(tmp_path):
    (tmp_path / "a.txt").write_text("a <|endoftext|> in a text <|padding|>\n" * 50)
    config = make_config({"inputs": [str(tmp_path / "a.txt")], "vocab_size": 300, "seq_len": 8})
    data = prepare_data(config, tmp_path / "tokens")
    assert (data.train == END_ID).sum() == 1
    assert data.train[-1] == END_ID


def test_a_tokenizer_of_our_own_has_all_bytes(tmp_path):
    config = make_config({"inputs": [str(tmp_path / "nothing.txt")], "vocab_size": 257})
    with pytest.raises(InputError, match="vocab_size must be at least 258: 256 bytes and 2 special tokens; got 257"):
        prepare_data(config, tmp_path / "tokens")


def test_bits_per_byte_of_a_uniform_code(tmp_path):
    (tmp_path / "a.txt").write_text("some text to hold " * 40)
    config = make_config({"inputs": [str(tmp_path / "a.txt")], "vocab_size": 258, "seq_len": 8})
    data = prepare_data(config, tmp_path / "tokens")
    tokens = torch.from_numpy(data.val[:-1].astype(np.int64))
    mean = MeanLoss()
    for part in tokens.split(5):
        mean.add(torch.tensor(math.log(256)), len(part), data.count_bytes(part))
    assert mean.take() == pytest.approx((math.log(256), 8.0))


def test_a_text_that_cannot_be_read_is_no_full_disk(tmp_path, monkeypatch):
    text = write_text(tmp_path / "text.txt")

    def refuse(path, *_):
        if path == text:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path_open(path, *_)

    path_open = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"cannot read .*text.txt: Permission denied"):
        prepare_data(make_config({"inputs": [str(text)]}), tmp_path / "tokens")


def test_too_long_windows(tmp_path):
    (tmp_path / "a.txt").write_text("abc def ghi " * 10)
    config = make_config({"inputs": [str(tmp_path / "a.txt")], "seq_len": 512})
    with pytest.raises(InputError, match=r"seq_len is 512, but the training text has only \d+ tokens"):
        prepare_data(config, tmp_path / "tokens")


@given(ranks=st.sampled_from([1, 2, 3, 6, 12]), step=st.integers(0, 30))
def test_ranks_share_a_step_whatever_their_number(ranks, step):
    windows = Windows(np.arange(500, dtype=np.uint16), 8, 12, seed=3)
    shares = [windows.step(step, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {12 // ranks}
    assert torch.equal(torch.cat(shares), windows.step(step))


@pytest.mark.parametrize(("rank", "ranks"), [(0, 5), (2, 2), (-1, 2)])
def test_shares_are_equal(rank, ranks):
    windows = Windows(np.arange(500, dtype=np.uint16), 8, 12, seed=3)
    with pytest.raises(ValueError, match=rf"rank {rank} of {ranks} cannot have an equal share of 12 windows per step"):
        windows.step(0, rank, ranks)


def test_documents_begin_where_the_one_before_ends():
    inputs = separate_documents(torch.tensor([[5, 6, 1, 7, 1, 1], [1, 5, 6, 7, 8, 9]]), end_id=1)
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert inputs["shift_labels"].tolist() == [[6, 1, 7, 1, 1, -100], [5, 6, 7, 8, 9, -100]]


@torch.no_grad()
@pytest.mark.parametrize("documents", ["separate", "joined"])
@pytest.mark.parametrize("model", ["transnormer", "llama"])
def test_the_loss_of_a_window_is_that_of_its_documents_one_by_one(model, documents):
    """Each document is read alone, in float64, with the end of text before it."""
    torch.manual_seed(0)
    settings = {"width": 32, "layers": 2, "heads": 2, "glu_dim": 32, "model": model}
    config = make_config({**settings, "documents": documents})
    with torch.device("meta"):
        made = new_model(config, 40)
    learner = Learner(config, Runtime.choose("cpu", "float32"), made)
    learner.model.double()
    windows = torch.randint(2, 40, (2, 23))
    windows[0, [6, 7, 15]] = windows[1, 4] = windows[1, 22] = END_ID
    nats = []
    for row in windows.tolist():
        starts = [0, *(i for i, token in enumerate(row) if token == END_ID and i), len(row) - 1]
        for start, stop in itertools.pairwise(starts):
            document = torch.tensor([row[start : stop + 1]])
            if len(document[0]) > 1:
                logits = learner.model(document[:, :-1]).logits
                nats.append(torch.nn.functional.cross_entropy(logits[0], document[0, 1:], reduction="sum"))
    alone = torch.stack(nats).sum() / (windows.numel() - len(windows))
    apart = abs(
        float(learner.loss(windows, learner.predicted(windows))) - float(alone)
    )  # the loss is float32; joined documents put it 6e-4 apart
    assert apart < 2e-6 if documents == "separate" else apart > 1e-4
