"""Find the text to train on and hold it on disk, so that a corpus may be larger than memory."""

from __future__ import annotations

import codecs
import glob
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from lightning_attention.training.config import InputError, TrainConfig

PIECE_BYTES = 1 << 20
SKIPPED_STDLIB_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class SpooledCorpus:
    """Documents one after another in a binary file, as UTF-8, with the offset at which each of them ends."""

    def __init__(self, file: IO[bytes]) -> None:
        """Start with no text in `file`, which must be open for reading and writing."""
        self._file = file
        self._ends: list[int] = []

    @property
    def total_bytes(self) -> int:
        """Bytes of text."""
        return self._ends[-1] if self._ends else 0

    def add(self, texts: Iterable[str]) -> None:
        """Append one document, given in any number of pieces; an empty one is left out."""
        size = sum(self._file.write(text.encode("utf-8", errors="replace")) for text in texts)
        if size:
            self._ends.append(self.total_bytes + size)

    def split_at(self, fraction: float) -> int:
        """The offset of the character at which the last `fraction` of the bytes begins."""
        offset = int(self.total_bytes * (1 - fraction))
        self._file.seek(offset)
        following = self._file.read(4)
        return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))

    def pieces(self, start: int, end: int) -> Iterator[tuple[str, bool]]:
        """The text of bytes start..end in pieces of about 1 MB, each with whether a document ends with it."""
        doc_start = 0
        for doc_end in self._ends:
            position, stop = max(start, doc_start), min(end, doc_end)
            while position < stop:
                self._file.seek(position)
                raw = self._file.read(min(PIECE_BYTES, stop - position))
                if position + len(raw) < stop:
                    raw = raw[: _last_break(raw)]
                position += len(raw)
                yield raw.decode("utf-8"), position == doc_end
            doc_start = doc_end


def _last_break(raw: bytes) -> int:
    """Where to cut: after the last line end, so that tokens are those of the whole text; else after a character."""
    cut = raw.rfind(b"\n") + 1
    return cut or len(raw.decode("utf-8", errors="ignore").encode())  # only an unfinished last character is ignored


def spool(config: TrainConfig, file: IO[bytes], stdin: BinaryIO | None = None) -> SpooledCorpus:
    """Read all that the configuration names into `file`. Raises InputError when something is missing or empty."""
    corpus = SpooledCorpus(file)
    if config.inputs:
        for name in config.inputs:
            if name == "-":
                corpus.add(_decoded(stdin or sys.stdin.buffer))
            else:
                _add_files(corpus, _expand(name), skip_binary=not Path(name).is_file())
        label = " ".join(config.inputs)
    else:
        BUILT_IN[config.corpus](corpus)
        label = f"corpus {config.corpus}"
    if corpus.total_bytes == 0:
        raise InputError(f"there is no text in {label}")
    return corpus


def _add_pydoc(corpus: SpooledCorpus) -> None:
    from pydoc_data.topics import topics

    for text in topics.values():
        corpus.add([text])


def _add_stdlib(corpus: SpooledCorpus) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    sources = (p for p in root.rglob("*.py") if not SKIPPED_STDLIB_FOLDERS.intersection(p.relative_to(root).parts))
    _add_files(corpus, sorted(sources), skip_binary=True)


BUILT_IN: dict[str, Callable[[SpooledCorpus], None]] = {"pydoc": _add_pydoc, "stdlib": _add_stdlib}


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        visible = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return sorted(p for p in visible if p.is_file())
    if path.exists():
        return [path]
    found = sorted(Path(match) for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    if not found:
        what = "no file matches" if glob.has_magic(name) else "no such file or folder:"
        raise InputError(f"{what} {name}")
    return found


def _add_files(corpus: SpooledCorpus, paths: list[Path], skip_binary: bool) -> None:
    for path in paths:
        try:
            with path.open("rb") as file:
                if b"\0" in file.peek(1024)[:1024]:
                    if skip_binary:
                        continue
                    raise InputError(f"{path} is not text: it holds zero bytes")
                corpus.add(_decoded(file))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error


def _decoded(file: BinaryIO) -> Iterator[str]:
    """Text of a file in pieces. Bytes that are not UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while raw := file.read(PIECE_BYTES):
        yield decoder.decode(raw)
    yield decoder.decode(b"", final=True)
