"""Find the encoding of a text file, so that no byte of it is lost silently."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

PIECE_BYTES = 1 << 20
_BOMS = {  # UTF-32's first: that of UTF-16 begins it
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WIDE = ("utf-16", "utf-32")
_NO_TEXT = (b"%PDF-", b"PK\x03\x04", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # PDF, zip and its kin, gzip, zstandard


class NotTextError(Exception):
    """A file that cannot be read as text, and why."""


@dataclass(frozen=True)
class Encoding:
    """How a file is to be read.

    Args:
        name: of a codec.
        damaged: how many sequences of bytes are not valid in it.
        guessed_from: for a guess, the first words with the letters that it was guessed from, decoded with it.
    """

    name: str
    damaged: int = 0
    guessed_from: str = ""


def find_encoding(file: BinaryIO, asked: str) -> Encoding:
    """The encoding of a seekable file: the one that is asked for, or with "auto" what the bytes look like.

    Raises NotTextError when they do not look like text.
    """
    file.seek(0)
    head = file.read(PIECE_BYTES)
    if asked != "auto":
        if b"\0" in head and not codecs.lookup(asked).name.startswith(_WIDE):
            raise NotTextError("no text: zero bytes")
        return Encoding(asked)
    for bom, name in _BOMS.items():
        if head.startswith(bom):
            return Encoding(name)
    if head.startswith(_NO_TEXT):
        raise NotTextError("no text")
    if b"\0" in head:
        return Encoding(_guess_wide(head[: 1 << 16]))
    sample, damaged, characters = _read_as_utf8(file)
    # A page of UTF-8 with a broken character here and there is UTF-8. Text in another encoding has hardly a character
    # beyond ASCII that is right by chance.
    if damaged and damaged * 20 > characters:
        name = _guess(sample)
        words = [word for word in sample.decode(name, "replace").split() if not word.isascii()]
        return Encoding(name, guessed_from=" ".join(words[:4])[:60])
    return Encoding("utf-8", damaged)


def decoded(file: BinaryIO, encoding: Encoding) -> Iterator[str]:
    """The text of a seekable file in pieces. Raises NotTextError when a byte is not valid in that encoding."""
    errors = "replace" if encoding.damaged else "strict"
    decoder = codecs.getincrementaldecoder(encoding.name)(errors)
    file.seek(0)
    try:
        while raw := file.read(PIECE_BYTES):
            yield decoder.decode(raw)
        yield decoder.decode(b"", final=True)
    except UnicodeError as error:
        reason = getattr(error, "reason", str(error))
        raise NotTextError(f"not {encoding.name}: {reason}; is there another --encoding?") from error


def _read_as_utf8(file: BinaryIO) -> tuple[bytes, int, int]:
    """Up to 64 KB of lines that are not ASCII; how many sequences are not UTF-8; how many characters are not ASCII."""
    file.seek(0)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sample, damaged, characters = bytearray(), 0, 0
    while raw := file.read(PIECE_BYTES):
        text = decoder.decode(raw)
        if raw.isascii():
            continue
        broken = text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")  # the text may hold that character itself
        damaged += max(0, broken)
        characters += len(text) - len(text.encode("ascii", "ignore")) - broken
        if broken > 0 and len(sample) < 1 << 16:
            sample += b"\n".join(line for line in raw.split(b"\n") if not line.isascii())
    damaged += decoder.decode(b"", final=True).count("\ufffd")
    return bytes(sample[: 1 << 16]), damaged, characters


def _guess_wide(sample: bytes) -> str:
    """The encoding of text with zero bytes: the high halves of the characters that are ASCII."""
    for name, size, high in (("utf-16-le", 2, 1), ("utf-16-be", 2, 0), ("utf-32-le", 4, 3), ("utf-32-be", 4, 0)):
        low = sample[size - 1 - high :: size]
        if len(sample) % size == 0 and low.count(0) == 0 and sample[high::size].count(0) * 50 > len(low):
            text = sample.decode(name, "replace")
            if all(char.isspace() or (char.isprintable() and char != "\ufffd") for char in text):
                return name
    raise NotTextError("no text: zero bytes")


def _guess(sample: bytes) -> str:
    from charset_normalizer import from_bytes

    matches = from_bytes(sample)
    best = matches.best()
    if best is None:
        raise NotTextError("no text, or in no encoding that can be told; --encoding can name it")
    # Windows-1252, which holds Latin-1, is far the commonest, and the eastern European tables are as good for much of
    # what is written in it: "à" is "ŕ" there. So it wins where it is as likely, or nearly.
    for match in matches:
        # A page of French has had 0.018 of chaos as Windows-1252, and 0.009 as the Baltic cp1257.
        likely = match.chaos <= best.chaos + 0.02 and match.coherence >= best.coherence - 0.1
        if likely and "cp1252" in (match.encoding, *match.could_be_from_charset):
            return "cp1252"
    return best.encoding
