import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.errors import InputError
from lightning_attention.training import shards
from lightning_attention.training.shards import ShardWriter, TokenShards, open_part, read_manifest, write_manifest

END = 1


def write(folder, documents, vocab_size=300, shard_bytes=14):
    """Documents of tokens as a folder, of which each token stands for as many bytes as its number has units."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", shard_bytes)
        writers = [ShardWriter(folder, name, np.arange(vocab_size) % 10, END) for name in ("train", "val")]
        for writer in writers:
            for document in documents:
                writer.append(np.array(document[:2]))
                writer.append(np.array(document[2:], np.int64))
                writer.end_document()
            writer.close()
    (folder / "tokenizer.json").write_text("{}")
    return write_manifest(folder, writers[0].part, writers[1].part, vocab_size, [])


@given(
    documents=st.lists(st.lists(st.integers(2, 299), min_size=1, max_size=20), min_size=1, max_size=6),
    wide=st.booleans(),
    cut=st.tuples(st.integers(0, 130), st.integers(0, 130)),
)
def test_slices_are_those_of_one_array(tmp_path_factory, documents, wide, cut):
    folder = tmp_path_factory.mktemp("tokens")
    about = write(folder, documents, vocab_size=70_000 if wide else 300)
    assert about == read_manifest(folder)
    tokens = open_part(folder, about, "train")
    whole = np.array([token for document in documents for token in (*document, END)])
    assert len(tokens) == about["train"]["tokens"] == len(whole)
    assert tokens[:].dtype == np.dtype(about["dtype"]) == (np.uint32 if wide else np.uint16)
    assert tokens[slice(*cut)].tolist() == whole[slice(*cut)].tolist()
    # No shard has more bytes than it may, and only the last one of a part fewer tokens than fit.
    sizes = [(folder / shard["file"]).stat().st_size for shard in about["train"]["shards"]]
    assert all(size <= 14 for size in sizes)
    assert all(size == (12 if wide else 14) for size in sizes[:-1])
    assert sum(shard["bytes"] for shard in about["train"]["shards"]) == about["train"]["bytes"] == (whole % 10).sum()
    ends = np.fromfile(folder / about["train"]["ends"], "<i8")
    assert ends.tolist() == np.cumsum([len(document) + 1 for document in documents]).tolist()
    assert about["train"]["documents"] == len(documents)


def test_more_shards_than_files_may_be_open(tmp_path):
    about = write(tmp_path, [[2, 3, 4]] * 200, shard_bytes=2)
    tokens = open_part(tmp_path, about, "val")
    assert len(about["val"]["shards"]) == 800
    assert [int(tokens[i : i + 1][0]) for i in range(800)] == [2, 3, 4, 1] * 200
    assert tokens._map.cache_info().currsize <= 64


def test_what_was_altered_is_noticed(tmp_path):
    about = write(tmp_path, [[2, 3, 4, 5]])
    other = tmp_path / "other"
    other.mkdir()
    assert write(other, [[2, 3, 4, 6]])["fingerprint"] != about["fingerprint"]  # every token counts

    manifest = tmp_path / shards.MANIFEST
    text = manifest.read_text()
    for found, put in ((about["train"]["shards"][0]["digest"], "0" * 32), ('"vocab_size": 300', '"vocab_size": 301')):
        manifest.write_text(text.replace(found, put, 1))
        with pytest.raises(InputError, match=r"the manifest or the tokenizer in .* has been altered"):
            read_manifest(tmp_path)
    manifest.write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(InputError, match="are of format 2; this version reads format 1"):
        read_manifest(tmp_path)
    manifest.write_text(text[:40])
    with pytest.raises(InputError, match=r"cannot open the tokens in "):
        read_manifest(tmp_path)
    manifest.write_text(text)
    (tmp_path / "tokenizer.json").write_text("{ }")
    with pytest.raises(InputError, match=r"the manifest or the tokenizer in .* has been altered"):
        read_manifest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    read_manifest(tmp_path)
    shard = tmp_path / about["train"]["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train-00000.bin has 8 bytes; it had 10 bytes when"):
        open_part(tmp_path, about, "train")
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00000.bin is not there; it had 10 bytes when"):
        open_part(tmp_path, about, "train")


def test_no_tokens():
    assert len(TokenShards(None, [], np.dtype("<u2"))) == 0
