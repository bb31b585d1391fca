"""Texts of any size into a folder of tokens, in one pass, or in two where a tokenizer is trained on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lightning_attention.errors import InputError
from lightning_attention.training.checkpoint import atomic_folder
from lightning_attention.training.config import DEFAULT_VAL_FRACTION, TrainConfig
from lightning_attention.training.corpus import Reader
from lightning_attention.training.shards import ShardWriter, write_manifest
from lightning_attention.training.sources import Tally
from lightning_attention.training.tokenizer import (
    END_ID,
    PAD_ID,
    as_pretrained,
    load_tokenizer,
    require_vocabulary,
    token_bytes,
    train_tokenizer,
)

SAMPLE_CHARACTERS = 100_000_000  # that a tokenizer is trained on
# Documents longer than a passage are held out by the passage. A batch is what is tokenized at a time, by all cores.
PASSAGE_CHARACTERS, BATCH_CHARACTERS = 1 << 18, 1 << 22


def tokenize_texts(
    config: TrainConfig,
    folder: Path,
    tokenizer: Path | None = None,
    report: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Read `config.inputs` and write `folder`, which appears whole or not at all.

    Memory does not grow with the texts: it holds a batch of them, or a sample while a tokenizer is trained. Repeated
    texts are kept, and fall on the same side: a digest of the text decides what is held out.

    Args:
        config: its inputs, encoding, text_field, val_fraction and vocab_size are used.
        folder: does not exist yet.
        tokenizer: a tokenizer.json, or a folder with one; None to train one of `config.vocab_size` tokens.
        report: called with every line of what was read and what was not.
        progress: called now and then with the number of tokens written so far.

    Returns:
        The manifest.

    Raises:
        InputError: a text or the tokenizer cannot be read, there is too little text, or the folder exists.
        DiskError: the disk has no room.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already; choose another --out, or delete it")
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if given is None:
        require_vocabulary(config.vocab_size)
    fraction = config.val_fraction or DEFAULT_VAL_FRACTION
    tally = Tally()
    with atomic_folder(folder) as target:
        sample = Sample(fraction)
        with closing(Reader(sample, Tally(), config, target)) as reader:
            if given is None:
                reader.read(config.inputs)
                given = train_tokenizer(sample.texts(), config.vocab_size), END_ID, PAD_ID
            del sample
            vocabulary, end_id, _ = given
            bytes_per_token = token_bytes(vocabulary)
            train, val = (ShardWriter(target, name, bytes_per_token, end_id) for name in ("train", "val"))
            with closing(train), closing(val):
                documents = TokenizedDocuments(vocabulary, train, val, fraction, progress)
                reader.again(documents, tally).read(config.inputs)
                documents.finish()
        for line in tally.lines():
            if report:
                report(line)
        as_pretrained(*given).save_pretrained(target)
        if not train.part.tokens or not val.part.tokens:
            raise InputError("there is too little text to hold some of it out")
        return write_manifest(target, train.part, val.part, len(bytes_per_token), tally.lines())


class Sample:
    """Passages for a tokenizer to be trained on, spread evenly over texts of unknown size, in bounded memory.

    A passage is in it when what is drawn for it is below a bound, which is halved whenever the sample is too large.
    """

    def __init__(self, held_out: float) -> None:
        """Leave out the share of the texts that is held out."""
        self.documents = 0
        self._held_out, self._bound = held_out, 1.0
        self._first = ""
        self._kept: list[tuple[float, str]] = []
        self._characters = 0

    def add(self, texts: Iterable[str]) -> bool:
        """One document."""
        before = self.documents
        for text, _ in passages(texts):
            self.documents = before + 1
            self._first = self._first or text
            side, drawn = _draws(text)
            if side >= self._held_out and drawn < self._bound:
                self._kept.append((drawn, text))
                self._characters += len(text)
                while self._characters > SAMPLE_CHARACTERS:
                    self._halve()
        return True

    def forget_after(self, documents: int) -> None:
        """What came before some damage stays, as it does in the tokens."""

    def texts(self) -> list[str]:
        """The passages that were drawn; if there are none, the first one."""
        return [text for _, text in self._kept] or [self._first]

    def _halve(self) -> None:
        self._bound /= 2
        self._kept = [(drawn, text) for drawn, text in self._kept if drawn < self._bound]
        self._characters = sum(len(text) for _, text in self._kept)


class TokenizedDocuments:
    """Documents written into shards, each on the side that its digest decides."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        train: ShardWriter,
        val: ShardWriter,
        held_out: float,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Hold that share of the texts out."""
        self.documents = 0
        self._tokenizer, self._train, self._val, self._held_out = tokenizer, train, val, held_out
        self._progress = progress
        self._waiting: list[tuple[str, bool]] = []  # passages, and whether a document ends with them
        self._size, self._characters = 0, 0  # of those that wait, and of all
        self._open: ShardWriter | None = None  # where a document has not ended yet

    def add(self, texts: Iterable[str]) -> bool:
        """Append one document, given in any number of pieces. When `texts` raises, it ends there."""
        before = self.documents
        try:
            for text, ends in passages(texts):
                self.documents = before + 1
                self._waiting.append((text, ends))
                self._size += len(text.encode())  # raises here, by name, where it is not Unicode
                if self._size > BATCH_CHARACTERS:
                    self._write_all_but(1)
        except Exception:
            if self.documents > before:
                self._waiting[-1] = (self._waiting[-1][0], True)
            raise
        return True

    def forget_after(self, documents: int) -> None:
        """What came before some damage is written already: it stays."""

    def finish(self) -> None:
        """Write what is left; where nothing would be held out, hold out the end of the text."""
        self._write_all_but(1)
        text, _ = self._waiting.pop()
        train, val, side = self._train, self._val, self._side(text)
        if (train if side is val else val).part.tokens:
            cut = len(text) if side is train else 0
        elif val.part.tokens:  # all is held out so far, by chance
            cut = len(text)
        else:
            cut = max(0, len(text) - max(1, round(self._held_out * (self._characters + len(text)))))
            cut = text.find("\n", cut, -1) + 1 or cut
        for part, writer in ((text[:cut], train), (text[cut:], val)):
            if part:
                self._write(self._tokenizer.encode(part, add_special_tokens=False).ids, writer, True)

    def _write_all_but(self, kept: int) -> None:
        ready, self._waiting = self._waiting[:-kept], self._waiting[-kept:]
        self._size = sum(len(text.encode()) for text, _ in self._waiting)
        codes = self._tokenizer.encode_batch_fast([text for text, _ in ready], add_special_tokens=False)
        for (text, ends), code in zip(ready, codes, strict=True):
            self._characters += len(text)
            self._write(code.ids, self._side(text), ends)
        if self._progress:
            self._progress(self._train.part.tokens + self._val.part.tokens)

    def _side(self, text: str) -> ShardWriter:
        return self._val if _draws(text)[0] < self._held_out else self._train

    def _write(self, ids: list[int], side: ShardWriter, ends: bool) -> None:
        if self._open not in (None, side):  # the passage before it went to the other side
            self._open.end_document()
        side.append(np.array(ids, np.int64))
        self._open = side
        if ends:
            side.end_document()
            self._open = None


def passages(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A document in passages, each with whether the document ends with it; none where there is no text.

    They are cut after a line where there is one, so that tokens are those of the whole text.
    """
    held = ""
    for text in texts:
        held += text
        start = 0
        while len(held) - start > PASSAGE_CHARACTERS:
            stop = start + PASSAGE_CHARACTERS
            cut = held.rfind("\n", start, stop) + 1 or stop
            yield held[start:cut], False
            start = cut
        held = held[start:]
    if held:
        yield held, True


def _draws(text: str) -> tuple[float, float]:
    """Two random numbers in [0, 1), always the same for the same text."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    first, second = (int.from_bytes(half, "little") / 2**64 for half in (digest[:8], digest[8:]))
    return first, second
