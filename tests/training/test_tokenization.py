import bz2
import gzip
import io
import json
import lzma
import random
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from lightning_attention.errors import InputError
from lightning_attention.training import containers, shards, tokenization
from lightning_attention.training.config import make_config
from lightning_attention.training.shards import open_part
from lightning_attention.training.tokenization import Sample, TokenizedDocuments, passages, tokenize_texts
from lightning_attention.training.tokenizer import load_tokenizer, token_bytes, train_tokenizer

WORDS = ["lightning", "attention", "naïve", "state", "漢字", "🙂", "the", "of", "<|endoftext|>"]


def made_up(count=60, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) + f" {seed} {i}\n" for i in range(count)]


DOCUMENTS = made_up()


def json_lines(documents):
    return "".join(json.dumps({"other": 1, "text": text}) + "\n" for text in documents)


@pytest.fixture
def small(monkeypatch):
    """Sizes that a test's text has many of."""
    monkeypatch.setattr(tokenization, "PASSAGE_CHARACTERS", 300)
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 500)


def tokenized(folder, *inputs, tokenizer=None, report=None, **settings):
    """The manifest of a new folder."""
    config = make_config({"inputs": [str(name) for name in inputs], "vocab_size": 300, "val_fraction": 0.2, **settings})
    return tokenize_texts(config, folder, tokenizer, report)


def texts(folder, part):
    """The documents of a part, as text."""
    about = shards.read_manifest(folder)
    tokenizer, end_id, _ = load_tokenizer(folder)
    tokens = open_part(folder, about, part)[:]
    assert np.fromfile(folder / about[part]["ends"], "<i8").tolist() == (np.flatnonzero(tokens == end_id) + 1).tolist()
    decoded = [tokenizer.decode(piece.tolist()) for piece in np.split(tokens, np.flatnonzero(tokens == end_id) + 1)]
    assert decoded.pop() == ""
    assert about[part]["bytes"] == len("".join(decoded).encode())
    return decoded


def test_every_document_is_on_one_side_whatever_else_there_is(tmp_path, small):
    (tmp_path / "a.jsonl").write_text(json_lines(DOCUMENTS))
    about = tokenized(tmp_path / "a", tmp_path / "a.jsonl")
    train, val = texts(tmp_path / "a", "train"), texts(tmp_path / "a", "val")
    assert len(about["train"]["shards"]) > 3
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert [text for text in DOCUMENTS if text in val] == val  # in their order
    assert 5 <= len(val) <= 20
    # In another order, among others, and twice, they fall on the same side.
    (tmp_path / "b.jsonl").write_text(json_lines([*DOCUMENTS[::-1], *made_up(seed=1), *DOCUMENTS]))
    tokenized(tmp_path / "b", tmp_path / "b.jsonl", tokenizer=tmp_path / "a")
    assert {*texts(tmp_path / "b", "val")} & {*DOCUMENTS} == {*val}
    assert {*texts(tmp_path / "b", "train")} & {*DOCUMENTS} == {*train}


def test_the_same_text_gives_the_same_folder(tmp_path, small):
    (tmp_path / "a.jsonl").write_text(json_lines(DOCUMENTS))
    one, two = (tokenized(tmp_path / name, tmp_path / "a.jsonl") for name in "ab")
    assert one == two
    assert one["fingerprint"] != tokenized(tmp_path / "c", tmp_path / "a.jsonl", vocab_size=290)["fingerprint"]


def test_a_long_document_is_held_out_by_the_passage(tmp_path, small):
    text = "".join(DOCUMENTS)
    (tmp_path / "a.txt").write_text(text)
    tokenized(tmp_path / "a", tmp_path / "a.txt")
    train, val = texts(tmp_path / "a", "train"), texts(tmp_path / "a", "val")
    assert len(train) > 2
    assert len(val) > 2
    # Both are the text, cut at ends of lines, and an end of text stands wherever one of them goes on elsewhere.
    rest, sides = text, [[*train], [*val]]
    while rest:
        piece = next(side.pop(0) for side in sides if side and rest.startswith(side[0]))
        rest = rest[len(piece) :]
        assert piece.endswith("\n")
    assert sides == [[], []]
    # The tokens of a run of passages are those of its text.
    tokenizer = load_tokenizer(tmp_path / "a")[0]
    tokens = open_part(tmp_path / "a", shards.read_manifest(tmp_path / "a"), "train")
    assert tokens[: len(ids := tokenizer.encode(train[0]).ids)].tolist() == ids


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_of_little_text_some_is_on_either_side(tmp_path, count, seed):
    documents = made_up(count, seed)
    (tmp_path / "a.jsonl").write_text(json_lines(documents))
    tokenized(tmp_path / "a", tmp_path / "a.jsonl")
    train, val = texts(tmp_path / "a", "train"), texts(tmp_path / "a", "val")
    assert train
    assert val
    assert sorted("".join(train + val)) == sorted("".join(documents))


def test_too_little_text(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="too little text to hold some of it out"):
        tokenized(tmp_path / "a", tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def _zstd(raw):
    zstd = containers._zstd()
    return zstd.compress(raw[:100]) + zstd.compress(raw[100:])  # two frames, as of concatenated files


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


def write_parquet(path, documents):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"n": [0] * len(documents), "text": documents}), path, row_group_size=7)


def write_data_set(path, documents):
    import datasets

    datasets.Dataset.from_dict({"n": [0] * len(documents), "text": documents}).save_to_disk(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "a.jsonl").write_text(json_lines(DOCUMENTS))
    return tokenized(folder / "tokens", folder / "a.jsonl")


@pytest.mark.parametrize("kind", [*PACKED, ".parquet", "data set", ".arrow"])
def test_whatever_holds_the_texts(tmp_path, plain, kind):
    source = tmp_path / "texts"
    source.mkdir()
    if kind in PACKED:
        (source / f"a.jsonl{kind}").write_bytes(PACKED[kind](json_lines(DOCUMENTS).encode()))
        name = source
    elif kind == ".parquet":
        write_parquet(source / "a.parquet", [None, *DOCUMENTS, ""])
        name = source / "*.parquet"
    else:
        write_data_set(source / "set", DOCUMENTS)
        name = source / "set" if kind == "data set" else source / "set" / "*.arrow"
    said = []
    about = tokenized(tmp_path / "tokens", name, report=said.append)
    assert about["fingerprint"] == plain["fingerprint"]
    assert said[0].startswith("read 1 file: 1 utf-8")
    if kind == ".parquet":
        assert said[1:] == [f"left out 2, without text: {source}/a.parquet row 1, {source}/a.parquet row 62"]


@pytest.mark.parametrize("suffix", PACKED)
def test_a_plain_text_that_is_compressed(tmp_path, suffix):
    (tmp_path / "a.txt").write_text("naïve text\n" * 50)
    (tmp_path / f"b.txt{suffix}").write_bytes(PACKED[suffix]((tmp_path / "a.txt").read_bytes()))
    one, two = (tokenized(tmp_path / name[0], tmp_path / name) for name in ("a.txt", f"b.txt{suffix}"))
    assert one["fingerprint"] == two["fingerprint"]


@pytest.mark.parametrize("suffix", [*PACKED, ".parquet"])
def test_what_is_damaged(tmp_path, suffix):
    file = tmp_path / "texts" / f"a.jsonl{suffix}"
    file.parent.mkdir()
    if suffix in PACKED:
        file.write_bytes(PACKED[suffix](json_lines(DOCUMENTS).encode()))
    else:
        write_parquet(file, DOCUMENTS)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match=rf"a.jsonl{suffix} is (a )?damaged "):
        tokenized(tmp_path / "tokens", file)
    (file.parent / "b.jsonl").write_text(json_lines(DOCUMENTS))
    said = []
    tokenized(tmp_path / "tokens", file.parent, report=said.append)
    assert "damaged " in said[1]
    assert f"{file}" in said[1]
    assert sorted(texts(tmp_path / "tokens", "train") + texts(tmp_path / "tokens", "val")) == sorted(DOCUMENTS)


def test_bad_input_is_named(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "bad.jsonl").write_text(json_lines(DOCUMENTS) + "{")
    write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    write_data_set(tmp_path / "set", DOCUMENTS)
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    tokenized(tmp_path / "tokens", tmp_path / "set")

    def message(*names, **settings):
        with pytest.raises(InputError) as caught:
            tokenized(tmp_path / "new", *(tmp_path / name for name in names), **settings)
        assert not (tmp_path / "new").exists()
        return str(caught.value)

    assert "bad.jsonl is not JSON in line 61" in message("set", "bad.jsonl")
    assert "without a column 'body' (--text-field): it has 'n', 'text'" in message("a.parquet", text_field="body")
    assert "without a column 'body' (--text-field): it has 'n', 'text'" in message("set", text_field="body")
    assert "a.parquet is without text in its column 'n': it is of type int64" in message("a.parquet", text_field="n")
    assert "set is without text in its column 'n': it is of type int64" in message("set", text_field="n")
    assert f"name one of their folders: {tmp_path}/splits/train, {tmp_path}/splits/test" in message("splits")
    assert "tokens holds tokens, not text" in message("tokens")
    assert "no such file or folder" in message("absent")
    with pytest.raises(InputError, match="tokens exists already; choose another --out"):
        tokenized(tmp_path / "tokens", tmp_path / "set")
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "reading it needs pyarrow: pip install pyarrow" in message("a.parquet")
    assert "reading it needs datasets: pip install datasets" in message("set")
    monkeypatch.setattr(containers, "_zstd", lambda: None)
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    assert "needs backports.zstd: pip install backports.zstd" in message("a.zst")


def test_a_file_of_a_folder_that_breaks_off_is_kept_as_far_as_it_goes(tmp_path, small):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(json_lines(DOCUMENTS) + "{\n" + json_lines(["after that"]))
    said = []
    tokenized(tmp_path / "tokens", tmp_path / "texts", report=said.append)
    assert sorted(texts(tmp_path / "tokens", "train") + texts(tmp_path / "tokens", "val")) == sorted(DOCUMENTS)
    assert any("not JSON in line 61" in line and "what comes before that is kept" in line for line in said)


def test_standard_input_is_read_once_and_used_twice(tmp_path, monkeypatch, plain):
    raw = gzip.compress(json_lines(DOCUMENTS).encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert tokenized(tmp_path / "tokens", "-")["fingerprint"] == plain["fingerprint"]


def test_memory_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(tokenization, "PASSAGE_CHARACTERS", 100)
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(tokenization, "SAMPLE_CHARACTERS", 3000)

    class Counter:
        def __init__(self):
            self.part = shards.Part()

        def append(self, tokens):
            self.part.tokens += len(tokens)

        def end_document(self):
            pass

    tokenizer = train_tokenizer(["the"], 258)
    sample, written = Sample(0.1), TokenizedDocuments(tokenizer, Counter(), Counter(), 0.1)
    most = 0

    def endless():
        nonlocal most
        for i in range(3000):
            yield f"line {i} of it\n"
            most = max(most, sum(len(text) for text, _ in written._waiting))

    assert all(len(text) <= 100 for text, _ in passages(endless()))
    written.add(endless())
    assert 900 < most < 1200
    sample.add(endless())
    kept = sample.texts()
    assert 1000 < sum(map(len, kept)) <= 3000
    assert max(int(text.split()[-3]) for text in kept) > 2000  # from all over it


def test_the_sample_does_not_depend_on_the_order(monkeypatch):
    monkeypatch.setattr(tokenization, "SAMPLE_CHARACTERS", 2000)
    one, two = Sample(0.2), Sample(0.2)
    for text in DOCUMENTS:
        one.add([text])
    for text in DOCUMENTS[::-1]:
        two.add([text])
    assert sorted(one.texts()) == sorted(two.texts())
    assert not [text for text in one.texts() if tokenization._draws(text)[0] < 0.2]


def word_level(folder, config=None):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "<stop>": 2, "<0x0A>": 3, "▁naïve": 5}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<stop>"])
    tokenizer.enable_truncation(2)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>", "special": True}])
def test_a_tokenizer_that_exists(tmp_path, eos):
    (tmp_path / "a.txt").write_text("a naïve a " * 20)
    folder = word_level(tmp_path / "hf", {"eos_token": eos, "pad_token": eos})
    about = tokenized(tmp_path / "tokens", tmp_path / "a.txt", tokenizer=folder)
    assert about["vocab_size"] == 6  # 4 is a hole
    tokens = open_part(tmp_path / "tokens", about, "train")[:].tolist()
    assert tokens[:3] + tokens[-1:] == [1, 5, 1, 2]
    tokenizer, end_id, pad_id = load_tokenizer(tmp_path / "tokens")
    assert (end_id, pad_id) == (2, None)
    assert token_bytes(tokenizer).tolist() == [0, 2, 0, 1, 0, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "tokens").eos_token_id == 2


def test_a_tokenizer_without_an_end(tmp_path):
    (tmp_path / "a.txt").write_text("a naïve a " * 20)
    for name, config, wanted in (("a", None, "<|endoftext|> or </s> or"), ("b", {"eos_token": "<eot>"}, "<eot>")):
        with pytest.raises(InputError, match=r"has no token that ends a text: ") as caught:
            tokenized(tmp_path / "tokens", tmp_path / "a.txt", tokenizer=word_level(tmp_path / name, config))
        assert f"ends a text: {wanted}" in str(caught.value)
    with pytest.raises(InputError, match="cannot read the tokenizer "):
        tokenized(tmp_path / "tokens", tmp_path / "a.txt", tokenizer=tmp_path / "a.txt")
