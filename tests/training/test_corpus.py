import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.training import corpus as corpus_module
from lightning_attention.training.config import InputError, make_config
from lightning_attention.training.corpus import SpooledCorpus, spool


def spooled(**settings) -> tuple[SpooledCorpus, str]:
    """A corpus, and all of its documents with a bar after each."""
    corpus = spool(make_config(settings), io.BytesIO())
    return corpus, "".join(text + "|" * ends for text, ends in corpus.pieces(0, corpus.total_bytes))


@given(
    documents=st.lists(st.text("aé漢🙂\n ", max_size=40), max_size=4),
    piece=st.integers(4, 12),
    fraction=st.floats(0.05, 0.95),
)
def test_pieces_give_back_the_text(documents, piece, fraction):
    whole = "".join(documents).encode()
    corpus = SpooledCorpus(io.BytesIO())
    for document in documents:
        corpus.add([document[:3], document[3:]])
    assert corpus.total_bytes == len(whole)
    cut = corpus.split_at(fraction)
    assert abs(cut - len(whole) * (1 - fraction)) < 4  # the next character, of at most 4 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PIECE_BYTES", piece)
        left, right = list(corpus.pieces(0, cut)), list(corpus.pieces(cut, len(whole)))
    for part, raw in ((left, whole[:cut]), (right, whole[cut:])):
        assert "".join(text for text, _ in part).encode() == raw
        assert all(text and len(text.encode()) <= piece for text, _ in part)
    joined = "".join(text + "|" * ends for text, ends in left + right)
    assert joined == "".join(document + "|" for document in documents if document)


def test_pieces_break_after_lines():
    corpus = SpooledCorpus(io.BytesIO())
    corpus.add(["one\ntwo\nthree"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PIECE_BYTES", 6)
        assert [text for text, _ in corpus.pieces(0, 13)] == ["one\n", "two\n", "three"]


def test_default_corpus_is_pydoc_topics():
    from pydoc_data.topics import topics

    corpus, text = spooled()
    assert text == "".join(topic + "|" for topic in topics.values())
    assert corpus.total_bytes > 400_000


def test_stdlib_corpus_holds_modules_and_no_tests():
    _, text = spooled(corpus="stdlib")
    assert "class ThreadPoolExecutor(" in text
    assert "class TestProgram(" in text  # unittest itself is a module
    assert "import test.support" not in text.splitlines()


def test_files_folders_globs_and_stdin(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bé")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(b"\0\1")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("stdin ü".encode())))
    assert spooled(inputs=[str(tmp_path)])[1] == "a|bé|c|"
    assert spooled(inputs=[str(tmp_path / "*.txt")])[1] == "bé|"
    assert spooled(inputs=[str(tmp_path / "**" / "*.txt")])[1] == "bé|c|"
    assert spooled(inputs=[str(tmp_path / "b.txt"), "-"])[1] == "bé|stdin ü|"


def test_bytes_that_are_no_text_become_replacement_characters(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    assert spooled(inputs=[str(tmp_path / "latin.txt")])[1] == "na�ve|"


def test_bad_input(tmp_path):
    (tmp_path / "binary.bin").write_bytes(b"text\0")
    (tmp_path / "empty.txt").write_text("")
    for name, message in {
        "missing.txt": "no such file or folder: ",
        "*.rst": "no file matches ",
        "binary.bin": "is not text: it holds zero bytes",
        "empty.txt": "there is no text in ",
    }.items():
        with pytest.raises(InputError, match=message):
            spooled(inputs=[str(tmp_path / name)])
