"""Token files and the order in which their windows are read: a pure function of seed and step."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lightning_attention.training.checkpoint import atomic_folder, remove_folder
from lightning_attention.training.config import InputError, TrainConfig
from lightning_attention.training.corpus import SpooledCorpus, spool
from lightning_attention.training.tokenizer import END_ID, token_bytes, train_tokenizer

MANIFEST = "token_files.json"


@dataclass(frozen=True)
class TokenData:
    """A tokenized corpus on disk, memory-mapped. `train` and `val` are [N] unsigned integers."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: np.ndarray  # [V], by token
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return len(self.bytes_per_token)

    def bits_per_byte(self, nats: float, tokens: Tensor) -> float:
        """The negative log-likelihood of `tokens` (any shape), spread over the bytes of text they stand for."""
        return nats / math.log(2) / max(1, self.count_bytes(tokens))

    def count_bytes(self, tokens: Tensor) -> int:
        """Bytes of text that `tokens` (any shape) stand for."""
        return int(self.bytes_per_token[tokens.numpy()].sum())


def prepare_data(config: TrainConfig, folder: Path) -> TokenData:
    """Tokenize the corpus into `folder`, or open what an earlier run of the same command left there.

    The tokenizer sees the training part only. Raises InputError when the text cannot be read or is too short for
    `config.seq_len`.
    """
    if not folder.exists():
        with tempfile.TemporaryFile() as file, atomic_folder(folder) as target:
            corpus = spool(config, file)
            cut = corpus.split_at(config.val_fraction)
            tokenizer = train_tokenizer((text for text, _ in corpus.pieces(0, cut)), config.vocab_size)
            tokenizer.save(str(target / "tokenizer.json"))
            digests = [
                _write_tokens(target / "train.bin", tokenizer, corpus, 0, cut),
                _write_tokens(target / "val.bin", tokenizer, corpus, cut, corpus.total_bytes),
            ]
            fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
            (target / MANIFEST).write_text(json.dumps({"fingerprint": fingerprint}))
    return open_data(config, folder)


def discard_data(folder: Path) -> None:
    """Delete the token files in `folder`. Raises InputError when it exists and holds something else."""
    if not folder.exists():
        return
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} exists and was not made by training; choose another output folder")
    remove_folder(folder)


def open_data(config: TrainConfig, folder: Path) -> TokenData:
    """Open the token files in `folder`. Raises InputError when they are missing or too short for `config.seq_len`."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        dtype = _dtype(tokenizer)
        train, val = (_map(folder / name, dtype) for name in ("train.bin", "val.bin"))
        fingerprint = json.loads((folder / MANIFEST).read_text())["fingerprint"]
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"cannot open the token files in {folder}: {error}") from error
    if len(train) < config.seq_len:
        raise InputError(f"seq_len is {config.seq_len}, but the training text has only {len(train)} tokens")
    if len(val) == 0:
        raise InputError("the held-out text is empty: the corpus is too short")
    return TokenData(train, val, tokenizer, token_bytes(tokenizer), fingerprint)


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


def _map(path: Path, dtype: type[np.unsignedinteger]) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")


def _write_tokens(path: Path, tokenizer: Tokenizer, corpus: SpooledCorpus, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for text, ends_document in corpus.pieces(start, end):
            ids = tokenizer.encode(text).ids
            raw = np.array([*ids, END_ID] if ends_document else ids, _dtype(tokenizer)).tobytes()
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()


class Windows:
    """Windows of `seq_len` consecutive tokens, shuffled anew in every epoch.

    The windows of an epoch do not overlap; where they start shifts from epoch to epoch, so that a small corpus is not
    always cut at the same places. Which tokens a step reads depends on nothing but the arguments here and the step.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, windows_per_step: int, seed: int) -> None:
        """Needs at least `seq_len` tokens."""
        self._tokens = tokens
        self._seq_len = seq_len
        self._per_step = windows_per_step
        self._seed = seed
        # One window fewer than fits leaves room to shift.
        self.per_epoch = max(1, len(tokens) // seq_len - 1)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def step(self, step: int) -> Tensor:
        """[windows_per_step, seq_len] int64: what step 0, 1, ... reads."""
        first = step * self._per_step
        return torch.stack([self._window(index) for index in range(first, first + self._per_step)])

    def _window(self, index: int) -> Tensor:
        epoch, position = divmod(index, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._starts(epoch))
        start = int(self._order[1][position])
        return torch.from_numpy(self._tokens[start : start + self._seq_len].astype(np.int64))

    def _starts(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self._seed, epoch))
        shift = random.integers(len(self._tokens) - self.per_epoch * self._seq_len + 1)
        return shift + self._seq_len * random.permutation(self.per_epoch)


def validation_batches(tokens: np.ndarray, seq_len: int, batch_size: int, limit: int) -> Iterator[Tensor]:
    """Batches of windows [b, t] int64 in which every one of the first `limit` tokens (0: all) is predicted once.

    A model predicts all but the first token of a window, so windows overlap by one token and an end-of-text token
    stands before the first.
    """
    limit = min(limit or len(tokens), len(tokens))
    stream = np.concatenate([[END_ID], tokens[:limit].astype(np.int64)])
    full = limit // (seq_len - 1)
    for first in range(0, full, batch_size):
        starts = (seq_len - 1) * np.arange(first, min(first + batch_size, full))
        yield torch.from_numpy(stream[starts[:, None] + np.arange(seq_len)])
    rest = stream[full * (seq_len - 1) :]
    if len(rest) > 1:
        yield torch.from_numpy(rest)[None]
