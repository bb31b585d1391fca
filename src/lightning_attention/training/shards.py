"""A folder of tokens: files of bounded size, read in place through memory maps, and a manifest that says what they are.

- `token_shards.json`, the manifest: dtype, vocabulary, and for each part its shards, tokens, documents and bytes;
- `train-00000.bin`, ..., `val-00000.bin`, ...: tokens, little-endian; every document ends with the end token;
- `train.ends.bin`, `val.ends.bin`: where each document ends, in tokens from the start of the part, little-endian int64;
- `tokenizer.json` and its companions, as transformers saves them.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightning_attention.errors import InputError

MANIFEST = "token_shards.json"
SHARD_BYTES = 1 << 28
_END = np.dtype("<i8")


@dataclass
class Shard:
    """One file of tokens: how many it has, and how many bytes of text they stand for."""

    file: str
    tokens: int = 0
    bytes: int = 0
    digest: str = ""


@dataclass
class Part:
    """The tokens to train on, or those that are held out."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    ends: str = ""
    shards: list[Shard] = field(default_factory=list)


def dtype_of(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smaller dtype that holds all tokens: 16 bits, or 32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes the shards of one part, one after the other."""

    def __init__(self, folder: Path, name: str, bytes_per_token: np.ndarray, end_id: int) -> None:
        """Write files that begin with `name`; `bytes_per_token` [V] is how much text each token stands for."""
        self.part = Part(ends=f"{name}.ends.bin")
        self._folder, self._name, self._end_id = folder, name, end_id
        self._bytes_per_token = bytes_per_token
        self._dtype = dtype_of(len(bytes_per_token))
        self._ends = (folder / self.part.ends).open("wb")
        self._file: BinaryIO | None = None

    def append(self, tokens: np.ndarray) -> None:
        """More tokens [n] of a document."""
        while len(tokens):
            if self._file is None:
                self._digest = hashlib.blake2b(digest_size=16)
                self.part.shards.append(Shard(f"{self._name}-{len(self.part.shards):05}.bin"))
                self._file = (self._folder / self.part.shards[-1].file).open("wb")
            shard = self.part.shards[-1]
            room = SHARD_BYTES // self._dtype.itemsize - shard.tokens
            now, tokens = tokens[:room], tokens[room:]
            raw, text_bytes = now.astype(self._dtype).tobytes(), int(self._bytes_per_token[now].sum())
            self._file.write(raw)
            self._digest.update(raw)
            for counts in (shard, self.part):
                counts.tokens += len(now)
                counts.bytes += text_bytes
            if len(now) == room:
                self._finish_shard()

    def end_document(self) -> None:
        """The document is whole."""
        self.append(np.array([self._end_id]))
        self._ends.write(np.array(self.part.tokens, _END).tobytes())
        self.part.documents += 1

    def close(self) -> None:
        """Finish the files."""
        self._finish_shard()
        self._ends.close()

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.part.shards[-1].digest = self._digest.hexdigest()


class TokenShards:
    """The tokens of a part, as one long array that can be sliced. Only what is read is in memory."""

    def __init__(self, folder: Path, shards: list[Shard], dtype: np.dtype[np.unsignedinteger]) -> None:
        """Raises InputError when a file is absent or not as long as it was."""
        for shard in shards:
            path, wanted = folder / shard.file, shard.tokens * dtype.itemsize
            there = path.stat().st_size if path.is_file() else None
            if there != wanted:
                raise InputError(
                    f"{path} {'is not there' if there is None else f'has {there:,} bytes'}; "
                    f"it had {wanted:,} bytes when the folder was written"
                )
        self._starts = [0, *accumulate(shard.tokens for shard in shards)]
        # A map holds a file open, and there may be more shards than files that a process may hold.
        self._map = lru_cache(maxsize=64)(lambda index: np.memmap(folder / shards[index].file, dtype, mode="r"))
        self._dtype = dtype

    def __len__(self) -> int:
        """How many tokens there are."""
        return self._starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        """[n]: the tokens of a slice without a step."""
        start, stop, _ = where.indices(len(self))
        parts = [np.empty(0, self._dtype)]
        while start < stop:
            index = bisect_right(self._starts, start) - 1
            end = min(stop, self._starts[index + 1])
            parts.append(self._map(index)[start - self._starts[index] : end - self._starts[index]])
            start = end
        return np.concatenate(parts)


def is_token_folder(path: Path) -> bool:
    """Whether `lightning-attention tokenize` wrote this folder."""
    return os.path.isfile(path / MANIFEST)  # Path.is_file raises where the folder cannot be searched


def write_manifest(folder: Path, train: Part, val: Part, vocab_size: int, sources: list[str]) -> dict[str, Any]:
    """Write the manifest of a folder whose other files are all there; returns it."""
    about = {
        "format": 1,
        "dtype": dtype_of(vocab_size).name,
        "vocab_size": vocab_size,
        "tokenizer": "tokenizer.json",
        "train": asdict(train),
        "val": asdict(val),
        "tokenizer_digest": _tokenizer_digest(folder),
        "sources": sources,
    }
    about["fingerprint"] = _fingerprint(about)
    (folder / MANIFEST).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return about


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote. Raises InputError when it is absent, or it or the tokenizer has been altered."""
    try:
        about: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        told = about["fingerprint"], about["tokenizer_digest"]
        intact = told == (_fingerprint(about), _tokenizer_digest(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot open the tokens in {folder}: {error}") from error
    if about["format"] != 1:
        raise InputError(f"the tokens in {folder} are of format {about['format']}; this version reads format 1")
    if not intact:
        raise InputError(f"the manifest or the tokenizer in {folder} has been altered since it was written")
    return about


def open_part(folder: Path, about: dict[str, Any], name: str) -> TokenShards:
    """The tokens of a part, "train" or "val". Raises InputError when a file is absent or of another size."""
    shards = [Shard(**shard) for shard in about[name]["shards"]]
    return TokenShards(folder, shards, dtype_of(about["vocab_size"]))


def _tokenizer_digest(folder: Path) -> str:
    return hashlib.blake2b((folder / "tokenizer.json").read_bytes(), digest_size=16).hexdigest()


def _fingerprint(about: dict[str, Any]) -> str:
    """A digest of the manifest, which has the digest of every file."""
    told = {name: value for name, value in about.items() if name not in ("fingerprint", "sources")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
