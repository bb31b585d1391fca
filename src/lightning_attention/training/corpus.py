"""The text to train on, held on disk, so that it may be larger than memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import sysconfig
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, BinaryIO, Protocol

from lightning_attention.errors import InputError
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.containers import (
    ARROW,
    COMPRESSED,
    data_set_texts,
    is_data_set,
    is_parquet,
    parquet_texts,
    unpacked,
)
from lightning_attention.training.encoding import PIECE_BYTES, Encoding, NotTextError, decoded, find_encoding
from lightning_attention.training.sources import Finder, Tally, shown

SKIPPED_STDLIB_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
JSON_LINES = (".jsonl", ".ndjson")
# A block of held-out text has at least so many bytes, four windows of the default length, and there are at most so many
# blocks: each costs the loss of the context before it.
BLOCK_BYTES, MOST_BLOCKS = 4096, 100
REPEATED = "the same text as one before"

Span = tuple[int, int]  # of bytes


class Documents(Protocol):
    """Something that documents are read into."""

    @property
    def documents(self) -> int:
        """How many there are."""

    def add(self, texts: Iterable[str]) -> bool:
        """Append one document, given in any number of pieces; False when there is the same one already."""

    def forget_after(self, documents: int) -> None:
        """Drop all but the first so many, except those already passed on."""


class SpooledCorpus:
    """Different documents one after another in a binary file, as UTF-8, with the offset at which each of them ends."""

    def __init__(self, file: IO[bytes], apart_from: SpooledCorpus | None = None) -> None:
        """Start with no text in `file`, which must be open for reading and writing.

        Documents that `apart_from` holds count as repeated ones.
        """
        self._file = file
        self._ends: list[int] = []
        self._digests: dict[bytes, None] = {}  # in the order of the documents
        self._apart_from = apart_from

    @property
    def total_bytes(self) -> int:
        """Bytes of text."""
        return self._ends[-1] if self._ends else 0

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self._ends)

    def add(self, texts: Iterable[str]) -> bool:
        """Append one document, given in any number of pieces; False when there is the same one already.

        An empty one is left out. When `texts` raises, nothing is appended.
        """
        start = self.total_bytes
        size, digest = 0, hashlib.blake2b(digest_size=16)
        self._file.seek(start)
        for text in texts:
            raw = text.encode("utf-8")
            digest.update(raw)
            size += self._file.write(raw)
        key = digest.digest()
        if key in self._digests or (self._apart_from and key in self._apart_from._digests):
            return False
        if size:
            self._ends.append(start + size)
            self._digests[key] = None
        return True

    def forget_after(self, documents: int) -> None:
        """Drop all but the first so many documents."""
        while len(self._ends) > documents:
            self._ends.pop()
            self._digests.popitem()

    def split(self, fraction: float) -> tuple[list[Span], list[Span]]:
        """What to train on and what to hold out: the last `fraction` of each of many equal parts of the text.

        A cut is moved to the end of a document or a line where one is near.
        """
        total = self.total_bytes
        blocks = max(1, min(MOST_BLOCKS, int(total * fraction) // BLOCK_BYTES))
        size = int(total / blocks * fraction)
        reach = min(size, total // blocks - size) // 4
        train: list[Span] = []
        held_out: list[Span] = []
        position = 0
        for block in range(1, blocks + 1):
            end = total * block // blocks
            cut = self._break_near(end - size, reach)
            end = self._break_near(end, reach) if block < blocks else total
            train.append((position, cut))
            held_out.append((cut, end))
            position = end
        return train, held_out

    def _break_near(self, offset: int, reach: int) -> int:
        following = bisect_left(self._ends, offset)
        if self._ends[following] <= offset + reach:
            return self._ends[following]
        self._file.seek(offset)
        raw = self._file.read(max(reach, 4))
        line = raw[:reach].find(b"\n") + 1
        return offset + (line or next((i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80), len(raw)))

    def pieces(self, spans: Iterable[Span]) -> Iterator[tuple[str, bool]]:
        """The text of spans of bytes in pieces of about 1 MB, each with whether a document or a span ends with it."""
        for start, end in spans:
            for document in range(bisect_left(self._ends, start + 1), len(self._ends)):
                doc_start = self._ends[document - 1] if document else 0
                if doc_start >= end:
                    break
                position, stop = max(start, doc_start), min(end, self._ends[document])
                while position < stop:
                    self._file.seek(position)
                    raw = self._file.read(min(PIECE_BYTES, stop - position))
                    if position + len(raw) < stop:
                        raw = raw[: _last_break(raw)]
                    position += len(raw)
                    yield raw.decode("utf-8"), position == stop


def _last_break(raw: bytes) -> int:
    """Where to cut: after the last line end, so that tokens are those of the whole text; else after a character."""
    cut = raw.rfind(b"\n") + 1
    return cut or len(raw.decode("utf-8", errors="ignore").encode())  # only an unfinished last character is ignored


def spool(
    config: TrainConfig,
    corpus: SpooledCorpus,
    tally: Tally,
    scratch: Path | None = None,
    names: Iterable[str] | None = None,
) -> None:
    """Read files, folders and globs, by default those to train on or else the built-in text.

    Standard input is copied into a file in `scratch` first, for its encoding to be found. Raises InputError when
    something is missing or there is no text in any of it.
    """
    names = config.inputs if names is None else names
    if names:
        with closing(Reader(corpus, tally, config, scratch)) as reader:
            reader.read(names)
    else:
        BUILT_IN[config.corpus](corpus, tally)


class Reader:
    """Reads files into a corpus, each in its encoding, and keeps the tally."""

    def __init__(self, corpus: Documents, tally: Tally, config: TrainConfig, scratch: Path | None = None) -> None:
        """Use the encoding and the text field of the configuration."""
        self._scratch = scratch
        self._corpus = corpus
        self._tally = tally
        self._config = config
        self._encodings: dict[str, Encoding] = {}
        self._copies: dict[str, BinaryIO] = {}  # of what can be read once only

    def again(self, corpus: Documents, tally: Tally) -> Reader:
        """A reader of the same names, standard input and pipes included, into another corpus."""
        other = Reader(corpus, tally, self._config, self._scratch)
        other._encodings, other._copies = self._encodings, self._copies
        return other

    def close(self) -> None:
        """Delete the copies of what can be read only once."""
        for copy in self._copies.values():
            copy.close()

    def read(self, names: Iterable[str]) -> None:
        """Read files, folders, globs, and for - standard input. Raises InputError when one is missing, or all empty."""
        names, before = [*names], self._corpus.documents
        finder = Finder(self._tally)
        for name in names:
            if name == "-":
                self._add_stream("standard input", sys.stdin.buffer)
                continue
            if is_data_set(Path(name)):
                self._add_rows(shown(name), data_set_texts(Path(name), self._config.text_field), named=True)
                continue
            for path, named in finder.find(name):
                self.add_file(path, named)
        if self._corpus.documents == before:
            raise InputError("; ".join([f"there is no text in {' '.join(names)}", *self._tally.lines()]))

    def add_file(self, path: Path, named: bool) -> None:
        """Read a file. One that cannot be read is an InputError if it was named, and else left out."""
        if path.name.lower().endswith(ARROW):
            self._add_rows(shown(path), data_set_texts(path, self._config.text_field), named)
            return
        try:
            file = path.open("rb")
        except OSError as error:
            if named:
                raise InputError(f"cannot read {shown(path)}: {error.strerror}") from error
            self._tally.skipped[f"cannot be read ({error.strerror})"].add(shown(path))
            return
        with file:
            if file.seekable():
                self._add(shown(path), file, named)
            else:
                self._add_stream(shown(path), file)

    def _add_stream(self, name: str, stream: BinaryIO) -> None:
        if name not in self._copies:
            self._copies[name] = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115 (open as long as the reader)
            shutil.copyfileobj(stream, self._copies[name])
        self._add(name, self._copies[name], named=True, has_suffix=False)

    def _add(self, name: str, file: BinaryIO, named: bool, has_suffix: bool = True) -> None:
        if is_parquet(file):
            self._add_rows(name, parquet_texts(file, self._config.text_field), named)
            return
        before = self._corpus.documents
        try:
            file = unpacked(file)
            encoding = self._encoding(name, file)
            texts = decoded(file, encoding)
            if _is_json_lines(name) if has_suffix else self._begins_as_json(decoded(file, encoding)):
                self._add_json_lines(name, texts)
                is_new = True
            else:
                is_new = self._corpus.add(texts)
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is not Unicode in {encoding.name}: {error.reason}") from error
        except NotTextError as error:
            self._leave_out(name, error, before, named)
            return
        if not is_new or self._corpus.documents == before:
            self._tally.skipped[REPEATED if not is_new else "without text"].add(name)
            return
        self._tally.read[encoding.name].add(name)
        if encoding.guessed_from:
            self._tally.guessed.setdefault(encoding.name, (name, encoding.guessed_from))
        if encoding.damaged:
            self._tally.damaged[name] = encoding.damaged

    def _encoding(self, name: str, file: BinaryIO) -> Encoding:
        if name not in self._encodings:
            self._encodings[name] = find_encoding(file, self._config.encoding)
        return self._encodings[name]

    def _leave_out(self, name: str, error: NotTextError, before: int, named: bool) -> None:
        """A file that is not, or not to its end, what can be read: an InputError if it was named."""
        self._corpus.forget_after(before)
        if named:
            raise InputError(f"{name} is {error}") from error
        kept = "" if self._corpus.documents == before else "; what comes before that is kept"
        self._tally.skipped[f"{error}{kept}"].add(name)

    def _add_rows(self, name: str, texts: Iterator[str | None], named: bool) -> None:
        """A document for every row of a column."""
        before = self._corpus.documents
        try:
            for number, text in enumerate(texts, 1):
                try:
                    if not text:
                        self._tally.skipped["without text"].add(f"{name} row {number}")
                    elif not self._corpus.add([text]):
                        self._tally.skipped[REPEATED].add(f"{name} row {number}")
                except UnicodeEncodeError as error:
                    raise NotTextError(f"not Unicode in row {number}: {error.reason}") from error
        except NotTextError as error:
            self._leave_out(name, error, before, named)
            return
        if self._corpus.documents > before:
            self._tally.read["utf-8"].add(name)

    def _begins_as_json(self, texts: Iterator[str]) -> bool:
        """Whether the first line is an object with the text field; for input without a file name."""
        first = next(texts, "").lstrip().partition("\n")[0]
        try:
            value = json.loads(first)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and self._config.text_field in value

    def _add_json_lines(self, name: str, texts: Iterable[str]) -> None:
        """A document for every line: a string, or the text field of an object."""
        field = self._config.text_field
        for number, line in enumerate(_lines(texts), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise NotTextError(f"not JSON in line {number}: {error}") from error
            if isinstance(value, dict):
                if field not in value:
                    there = ", ".join(map(repr, value))
                    raise NotTextError(f"without a field {field!r} in line {number} (--text-field): it has {there}")
                value = value[field]
            if not isinstance(value, str):
                raise NotTextError(f"without text in line {number}: it is of type {type(value).__name__}")
            try:
                if not self._corpus.add([value]):
                    self._tally.skipped[REPEATED].add(f"{name} line {number}")
            except UnicodeEncodeError as error:
                raise NotTextError(f"not Unicode in line {number}: {error.reason}") from error


def _is_json_lines(name: str) -> bool:
    name = name.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return name.removesuffix(packed).endswith(JSON_LINES)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        *whole, rest = (rest + text).split("\n")
        yield from whole
    yield rest


def _add_pydoc(corpus: SpooledCorpus, tally: Tally) -> None:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        if not corpus.add([text]):
            tally.skipped[REPEATED].add(name)


def _add_stdlib(corpus: SpooledCorpus, tally: Tally) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    reader = Reader(corpus, tally, TrainConfig())
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_STDLIB_FOLDERS.intersection(path.relative_to(root).parts):
            reader.add_file(path, named=False)


BUILT_IN: dict[str, Callable[[SpooledCorpus, Tally], None]] = {"pydoc": _add_pydoc, "stdlib": _add_stdlib}
