"""Token files and the order in which their windows are read: a pure function of seed and step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lightning_attention.errors import InputError
from lightning_attention.training.checkpoint import atomic_folder
from lightning_attention.training.config import DEFAULT_VAL_FRACTION, TrainConfig
from lightning_attention.training.corpus import Span, SpooledCorpus, spool
from lightning_attention.training.encoding import PIECE_BYTES
from lightning_attention.training.shards import TokenShards, dtype_of, is_token_folder, open_part, read_manifest
from lightning_attention.training.sources import Tally
from lightning_attention.training.tokenizer import (
    END_ID,
    PAD_ID,
    load_tokenizer,
    require_vocabulary,
    token_bytes,
    train_tokenizer,
)

MANIFEST = "token_files.json"
# Settings that say how to read a text, which somebody else has done where the tokens come from a folder.
_OF_TEXTS = ("corpus", "encoding", "text_field", "val_fraction", "validation")


@dataclass(frozen=True)
class TokenData:
    """A tokenized corpus on disk, memory-mapped. `train` and `val` are [N] unsigned integers."""

    train: np.ndarray | TokenShards
    val: np.ndarray | TokenShards
    tokenizer: Tokenizer
    bytes_per_token: np.ndarray  # [V], by token
    fingerprint: str
    end_id: int = END_ID  # the token that ends a text
    pad_id: int | None = PAD_ID  # the one that pads a batch, where there is one

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return len(self.bytes_per_token)

    def count_bytes(self, tokens: Tensor) -> int:
        """Bytes of text that `tokens` (any shape) stand for."""
        return int(self.bytes_per_token[tokens.numpy()].sum())


def prepare_data(config: TrainConfig, folder: Path, report: Callable[[str], None] | None = None) -> TokenData:
    """Tokenize the corpus into `folder`, which does not exist yet, or note there which folder of tokens to read.

    The tokenizer sees the training part only. `report` is called with every line of what was read and what was not.
    Raises InputError when the text cannot be read or is too short for `config.seq_len`, or a setting contradicts the
    tokens that exist, and DiskError when the disk is full.
    """
    if len(config.inputs) == 1 and is_token_folder(Path(config.inputs[0])):
        return _point_to(Path(config.inputs[0]).resolve(), config, folder)
    require_vocabulary(config.vocab_size)
    tally = Tally()
    with atomic_folder(folder) as target:
        # The text lies beside the tokens until they are made: the folder for temporary files is often the smallest.
        with (target / "text").open("w+b") as file, (target / "held_out_text").open("w+b") as held_out_file:
            if config.validation is None:
                corpus = held_out = SpooledCorpus(file)
                spool(config, corpus, tally, target)
                train, val = corpus.split(config.val_fraction or DEFAULT_VAL_FRACTION)
            else:
                held_out = SpooledCorpus(held_out_file)
                spool(config, held_out, tally, target, [config.validation])
                corpus = SpooledCorpus(file, apart_from=held_out)
                spool(config, corpus, tally, target)
                train, val = [(0, corpus.total_bytes)], [(0, held_out.total_bytes)]
            for line in tally.lines():
                if report:
                    report(line)
            tokenizer = train_tokenizer((text for text, _ in corpus.pieces(train)), config.vocab_size)
            tokenizer.save(str(target / "tokenizer.json"))
            _write_tokens(target / "train.bin", tokenizer, corpus, train)
            _write_tokens(target / "val.bin", tokenizer, held_out, val)
        for name in ("text", "held_out_text"):
            (target / name).unlink()
        about = {"fingerprint": _fingerprint(target), "sources": tally.lines()}
        (target / MANIFEST).write_text(json.dumps(about, indent=1))
        open_data(config, target)  # raises now where the text is too short
    return open_data(config, folder)


def _point_to(tokens: Path, config: TrainConfig, folder: Path) -> TokenData:
    """Note in `folder` that the tokens are those in the folder `tokens`, where they stay."""
    for name in _OF_TEXTS:
        value = getattr(config, name)
        if name in config.given and value != TrainConfig.__dataclass_fields__[name].default:
            raise InputError(f"{name} is {value!r}, but {tokens} holds tokens, not text: give it to `tokenize`")
    about = read_manifest(tokens)
    if "vocab_size" in config.given and config.vocab_size != about["vocab_size"]:
        raise InputError(f"vocab_size is {config.vocab_size}, but the tokens in {tokens} are of {about['vocab_size']}")
    with atomic_folder(folder) as target:
        note = {"fingerprint": about["fingerprint"], "tokens": str(tokens)}
        (target / MANIFEST).write_text(json.dumps(note, indent=1))
        return open_data(config, target)


def open_data(config: TrainConfig, folder: Path, trained_on: str | None = None) -> TokenData:
    """Open the token files in `folder`, or those that its note points to.

    Raises InputError when they are missing or too short for `config.seq_len`; with the fingerprint that a run was
    `trained_on` also when they are others, or one of them has been altered. For a folder of tokens, the manifest, the
    tokenizer and the size of every file are compared, which takes no time however many there are.
    """
    try:
        about = json.loads((folder / MANIFEST).read_text())
        data = _open_shards(Path(about["tokens"])) if "tokens" in about else _open_files(folder, about)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"cannot open the token files in {folder}: {error}") from error
    if trained_on and trained_on != data.fingerprint:
        place = about.get("tokens", folder)
        raise InputError(f"the token files in {place} are not those that the checkpoint was trained on")
    if trained_on and "tokens" not in about and trained_on != _fingerprint(folder):
        raise InputError(f"the token files in {folder} have been altered since the run began")
    if len(data.train) < config.seq_len:
        raise InputError(f"seq_len is {config.seq_len}, but the training text has only {len(data.train)} tokens")
    if len(data.val) == 0:
        raise InputError("the held-out text is empty: the corpus is too short")
    return data


def _open_shards(folder: Path) -> TokenData:
    about = read_manifest(folder)
    tokenizer, end, pad = load_tokenizer(folder)
    train, val = (open_part(folder, about, name) for name in ("train", "val"))
    return TokenData(train, val, tokenizer, token_bytes(tokenizer), about["fingerprint"], end, pad)


def _open_files(folder: Path, about: dict[str, Any]) -> TokenData:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    dtype = dtype_of(tokenizer.get_vocab_size())
    train, val = (_map(folder / name, dtype) for name in ("train.bin", "val.bin"))
    return TokenData(train, val, tokenizer, token_bytes(tokenizer), about["fingerprint"])


def _map(path: Path, dtype: np.dtype[np.unsignedinteger]) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")


def _write_tokens(path: Path, tokenizer: Tokenizer, corpus: SpooledCorpus, spans: Iterable[Span]) -> None:
    dtype = dtype_of(tokenizer.get_vocab_size())
    with path.open("wb") as file:
        for text, ends in corpus.pieces(spans):
            ids = tokenizer.encode(text).ids
            np.array([*ids, END_ID] if ends else ids, dtype).tofile(file)


def _fingerprint(folder: Path) -> str:
    """A digest of the contents of the token files. A gigabyte takes about a second."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "train.bin", "val.bin"):
        with (folder / name).open("rb") as file:
            while raw := file.read(PIECE_BYTES):
                digest.update(raw)
    return digest.hexdigest()


class Windows:
    """Windows of `seq_len` consecutive tokens, shuffled anew in every epoch.

    The windows of an epoch do not overlap; where they start shifts from epoch to epoch, so that a small corpus is not
    always cut at the same places. Which tokens a step reads depends on nothing but the arguments here and the step.
    """

    def __init__(self, tokens: np.ndarray | TokenShards, seq_len: int, windows_per_step: int, seed: int) -> None:
        """Needs at least `seq_len` tokens."""
        self._tokens = tokens
        self._seq_len = seq_len
        self._per_step = windows_per_step
        self._seed = seed
        # One window fewer than fits leaves room to shift.
        self.per_epoch = max(1, len(tokens) // seq_len - 1)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def step(self, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """[windows_per_step / ranks, seq_len] int64: what step 0, 1, ... reads, or one rank's equal share of it.

        The shares of rank 0, 1, ... one after the other are the whole step, however many ranks there are. Raises
        ValueError when `ranks` does not divide the windows of a step, or `rank` is none of them.
        """
        if self._per_step % ranks or not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks} cannot have an equal share of {self._per_step} windows per step")
        share = self._per_step // ranks
        first = step * self._per_step + rank * share
        return torch.stack([self._window(index) for index in range(first, first + share)])

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


def separate_documents(windows: Tensor, end_id: int) -> dict[str, Tensor]:
    """What a model is given with windows [b, t] so that no document in them sees another.

    An end-of-text token is the last label of the document before it and the first input of the one after it, so every
    token but a window's first is predicted, as in windows whose documents are joined.

    Returns:
        `position_ids` [b, t], which start again at 0 at every end-of-text token, and `shift_labels` [b, t], the token
        after each, -100 at a window's end.
    """
    index = torch.arange(windows.shape[1], device=windows.device).expand_as(windows)
    starts = index.where(windows == end_id, 0).cummax(1).values
    return {"position_ids": index - starts, "shift_labels": torch.nn.functional.pad(windows[:, 1:], (0, 1), value=-100)}


def validation_batches(
    tokens: np.ndarray | TokenShards, seq_len: int, batch_size: int, limit: int, end_id: int = END_ID
) -> Iterator[Tensor]:
    """Batches of windows [b, t] int64 in which each token is predicted once, at most `limit` of them (0: all).

    A model predicts all but the first token of a window, so windows overlap by one token and an end-of-text token
    stands before the first. With a limit they are whole windows, spread evenly over the tokens.
    """
    length = min(seq_len - 1, limit or seq_len)
    there = len(tokens) // length
    full = min(there, limit // length) if limit else there
    for first in range(0, full, batch_size):
        windows = [index * there // full for index in range(first, min(first + batch_size, full))]
        yield torch.stack([_after(tokens, index * length, length, end_id) for index in windows])
    rest = len(tokens) - there * length
    if rest and (not limit or limit >= len(tokens)):
        yield _after(tokens, there * length, rest, end_id)[None]


def _after(tokens: np.ndarray | TokenShards, start: int, length: int, end_id: int) -> Tensor:
    """[1 + length] int64: so many tokens from `start` on, and the one before them."""
    before = [end_id] if start == 0 else tokens[start - 1 : start]
    return torch.from_numpy(np.concatenate([before, tokens[start : start + length]]).astype(np.int64))
