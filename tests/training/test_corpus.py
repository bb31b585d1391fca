import io
import itertools
import json
import os
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.errors import InputError
from lightning_attention.training import corpus as corpus_module
from lightning_attention.training.config import make_config
from lightning_attention.training.corpus import SpooledCorpus, spool
from lightning_attention.training.sources import Tally


def spooled(**settings) -> tuple[SpooledCorpus, str, Tally]:
    """A corpus, all of its documents with a bar after each, and what was said about them."""
    corpus, tally = SpooledCorpus(io.BytesIO()), Tally()
    spool(make_config(settings), corpus, tally)
    return corpus, whole(corpus), tally


def whole(corpus: SpooledCorpus) -> str:
    return "".join(text + "|" * ends for text, ends in corpus.pieces([(0, corpus.total_bytes)]))


def read(*names: object, **settings) -> str:
    return spooled(inputs=[str(name) for name in names], **settings)[1]


def left_out(*names: object, **settings) -> dict[str, list[str]]:
    tally = spooled(inputs=[str(name) for name in names], **settings)[2]
    return {reason: [name.rpartition("/")[2] for name in names.first] for reason, names in tally.skipped.items()}


@given(
    documents=st.lists(st.text("aé漢🙂\n ", max_size=200), max_size=6),
    piece=st.integers(4, 12),
    block=st.integers(4, 60),
    fraction=st.floats(0.05, 0.95),
)
def test_training_and_held_out_text_make_the_whole_text(documents, piece, block, fraction):
    corpus = SpooledCorpus(io.BytesIO())
    for document in documents:
        corpus.add([document[:3], document[3:]])
    text = "".join(dict.fromkeys(documents)).encode()
    assert corpus.total_bytes == len(text)
    if not text:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PIECE_BYTES", piece)
        patch.setattr(corpus_module, "BLOCK_BYTES", block)
        train, held_out = corpus.split(fraction)
        spans = sorted([*train, *held_out])
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))  # no byte is in both or in neither
        for part in (train, held_out):
            pieces = list(corpus.pieces(part))
            assert "".join(text for text, _ in pieces).encode() == b"".join(text[start:end] for start, end in part)
            assert all(piece_text and len(piece_text.encode()) <= piece for piece_text, _ in pieces)
            assert sum(ends for _, ends in pieces) >= sum(end > start for start, end in part)  # a span ends a piece
    assert whole(corpus) == "".join(document + "|" for document in dict.fromkeys(documents) if document)


def test_held_out_blocks_are_spread_over_the_whole_text():
    lines = [f"line {number} of the text\n" for number in range(20_000)]
    corpus = SpooledCorpus(io.BytesIO())
    corpus.add(lines)
    train, held_out = corpus.split(0.1)
    assert len(held_out) == 10  # of 4 KB or more each
    assert sum(end - start for start, end in held_out) == pytest.approx(0.1 * corpus.total_bytes, rel=0.01)
    gaps = [end - start for start, end in train]
    assert max(gaps) < 1.1 * min(gaps)
    for text, _ in corpus.pieces(held_out):
        assert text.startswith("line ")  # no line is cut
        assert text.endswith("\n")


def test_a_cut_prefers_the_end_of_a_document():
    corpus = SpooledCorpus(io.BytesIO())
    for number in range(1000):
        corpus.add([f"document {number}\nwith more than a line\n"])
    for text, ends in corpus.pieces(corpus.split(0.1)[1]):
        assert text.startswith("document")
        assert ends


def test_pieces_break_after_lines():
    corpus = SpooledCorpus(io.BytesIO())
    corpus.add(["one\ntwo\nthree"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PIECE_BYTES", 6)
        assert [text for text, _ in corpus.pieces([(0, 13)])] == ["one\n", "two\n", "three"]


def test_default_corpus_is_pydoc_topics():
    from pydoc_data.topics import topics

    corpus, text, _ = spooled()
    assert text == "".join(topic + "|" for topic in dict.fromkeys(topics.values()))
    assert corpus.total_bytes > 400_000


def test_stdlib_corpus_holds_modules_and_no_tests():
    _, text, tally = spooled(corpus="stdlib")
    assert "class ThreadPoolExecutor(" in text
    assert "class TestProgram(" in text  # unittest itself is a module
    assert "import test.support" not in text.splitlines()
    assert tally.read["utf-8"].count > 200


def test_files_folders_globs_and_stdin(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bé")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(b"\0\1")
    assert read(tmp_path) == "a|bé|c|"
    assert read(tmp_path / "*.txt") == "bé|"
    assert read(tmp_path / "**" / "*.txt") == "bé|c|"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("stdin ü".encode())))
    assert read(tmp_path / "b.txt", "-") == "bé|stdin ü|"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Привет, как дела? ".encode("cp1251") * 20)))
    assert read("-") == "Привет, как дела? " * 20 + "|"


def test_says_what_was_read_and_what_was_not(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes("Где же вы теперь, друзья-однополчане?\n".encode("cp1251"))
    (tmp_path / "c.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "y.pdf").write_bytes(b"%PDF-1.7 text")
    assert spooled(inputs=[str(tmp_path)])[2].lines() == [
        f"read 2 files: 1 utf-8, 1 cp1251 ({tmp_path}/b.txt)",
        f'cp1251 is a guess: {tmp_path}/b.txt reads "Где же вы теперь," in it; '
        "if that is wrong, name the encoding with --encoding",
        f"left out 1, the same text as one before: {tmp_path}/c.txt",
        f"left out 1, without text: {tmp_path}/empty.txt",
        f"left out 1, no text: zero bytes: {tmp_path}/x.png",
        f"left out 1, no text: {tmp_path}/y.pdf",
    ]


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("Şu köşe yaz köşesi, şu köşe kış köşesi.\n", "cp1254"),
        ("Zażółć gęślą jaźń.\n", "iso8859-2"),
    ],
)
def test_a_guess_is_said_with_what_it_makes_of_the_text(tmp_path, text, codec):
    """A line of Turkish or Polish is too little to be sure; whoever wrote it sees at once whether it is right."""
    (tmp_path / "plain.txt").write_text("English and nothing else\n")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes((name + " " + text).encode(codec))
    _, found, tally = spooled(inputs=[str(tmp_path)])
    (line,) = (line for line in tally.lines() if "is a guess" in line)
    encoding, shown = re.fullmatch(
        rf'(\S+) is a guess: {tmp_path}/a.txt reads "(.+)" in it; if that is wrong, name the encoding with --encoding',
        line,
    ).groups()
    assert tally.read[encoding].count == 2
    assert shown.split()[0] in found  # it is what is trained on
    assert shown.split()[0].encode(encoding) in text.encode(codec)
    assert not any("is a guess" in line for line in spooled(inputs=[str(tmp_path)], encoding=codec)[2].lines())


def test_the_same_text_counts_once_whatever_it_is_called_and_however_it_is_encoded(tmp_path):
    text = "Der Fluß ist schön, die Straße über die Brücke auch.\n" * 3
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text(text, encoding="utf-16")
    (tmp_path / "c.txt").write_text(text, encoding="latin-1")
    (tmp_path / "d.txt").write_text(text, encoding="utf-8-sig")
    assert read(tmp_path) == text + "|"
    assert left_out(tmp_path) == {"the same text as one before": ["b.txt", "c.txt", "d.txt"]}


def test_json_lines_are_documents_without_their_syntax(tmp_path):
    lines = [{"text": "one\n", "id": 1}, {"id": 2, "text": "two é"}, {"text": "one\n"}, "three", {"text": ""}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert read(file) == "one\n|two é|three|"
    assert left_out(file) == {"the same text as one before": ["a.jsonl line 5"]}
    file.write_text('{"content": "one"}\n{"content": "two"}\n')
    assert read(file, text_field="content") == "one|two|"
    assert read(file.rename(tmp_path / "A.JSONL"), text_field="content") == "one|two|"


def test_standard_input_is_json_lines_where_its_first_line_is(monkeypatch):
    def piped(text: str, **settings) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return read("-", **settings)

    lines = '{"text": "one", "id": 1}\n\n{"text": "two"}\n'
    assert piped(lines) == piped("\n" + lines) == "one|two|"
    assert piped('{"content": "one"}\n', text_field="content") == "one|"
    with pytest.raises(InputError, match="standard input is not JSON in line 2"):
        piped('{"text": "one"}\nand so on')
    for text in ('{"content": "one"}\n', '"one"\n', "[1]", '{\n  "text": "one"\n}', '{"text"'):
        assert piped(text) == text + "|"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
def test_a_pipe_that_is_named_is_read(tmp_path):
    """As a shell's <(zcat a.jsonl.gz)."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for text, wanted in {"one é": "one é|", '{"text": "one"}\n{"text": "two"}': "one|two|"}.items():
        writer = threading.Thread(target=pipe.write_text, args=(text,), kwargs={"encoding": "utf-8"})
        writer.start()
        assert read(pipe) == wanted
        writer.join()
    with pytest.raises(InputError, match=r"/dev/zero is neither a file, a folder nor a pipe"):
        read("/dev/zero")


def test_an_encoding_that_makes_halves_of_characters(tmp_path):
    (tmp_path / "a.txt").write_text("text \\ud800 text")
    with pytest.raises(InputError, match=r"a.txt is not Unicode in unicode_escape: surrogates not allowed"):
        read(tmp_path / "a.txt", encoding="unicode_escape")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "two"}', r"is without a field 'text' in line 2 \(--text-field\): it has 'content'"),
        ('{"text": 5}', "is without text in line 2: it is of type int"),
        ("[1]", "is without text in line 2: it is of type list"),
        ("{text}", "is not JSON in line 2: "),
        ('{"text": "\\ud800"}', "is not Unicode in line 2: "),
    ],
)
def test_json_lines_that_hold_no_text(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line)
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path) == "b|"  # in a folder it is left out, and whole: its first line too
    assert [*left_out(tmp_path).values()] == [["a.jsonl"]]


def test_bad_input(tmp_path):
    (tmp_path / "binary.bin").write_bytes(b"text\0")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "cyrillic.txt").write_bytes("Привет".encode("cp1251"))
    for name, message in {
        "missing.txt": "no such file or folder: ",
        "*.rst": "no file matches ",
        "binary.bin": "is no text: zero bytes",
        "empty.txt": "there is no text in .*; left out 1, without text: ",
        "": "there is no text in .*; left out 1, no text: zero bytes: .*binary.bin; left out 1, not utf-8: ",
    }.items():
        with pytest.raises(InputError, match=message):
            read(tmp_path / name, encoding="utf-8" if not name else "auto")
