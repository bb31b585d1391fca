"""The loss of a trained model on a text: per token, per byte, and by how many tokens came before."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_attention.errors import DivergedError, InputError
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.corpus import SpooledCorpus, spool
from lightning_attention.training.data import separate_documents
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.sources import Tally
from lightning_attention.training.trained import Trained

MOST_LOGITS = 1 << 26  # so many at a time, 256 MB in float32


@dataclass(frozen=True)
class Bucket:
    """The mean loss, in nats per token, of tokens that have `first` to `last` others before them.

    They are those of the same window and, unless documents are joined, of the same document, with the end-of-text token
    that it comes after.
    """

    first: int
    last: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """The loss on a text, in nats per token, and the same in bits per byte of UTF-8.

    Tokens that mark ends of documents are predicted and counted too; they have no bytes.
    """

    documents: int
    text_bytes: int
    tokens: int
    loss: float
    bits_per_byte: float
    by_position: list[Bucket]


def evaluate(
    trained: Trained,
    text: TrainConfig,
    runtime: Runtime,
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int | None = None,
    report: Callable[[str], None] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Read a text in windows, every token of it predicted and counted once.

    Documents in a window see each other if the model was trained that way.

    Args:
        trained: the model, which is moved to the device of `runtime`, and its tokenizer.
        text: its `inputs`, `encoding` and `text_field` say what to read, and how.
        runtime: device and precision.
        seq_len: tokens in a window, at most, at least 2.
        stride: tokens that a window counts, its last ones; those before are read alone. None: all but the first, which
            the window before has counted.
        batch_size: windows at a time; None for as many as have 16,384 tokens.
        report: called with every line of what was read and what was not.
        advance: called with the bytes of text that have been read, and with all there are.

    Raises:
        InputError: the text cannot be read, a number is out of range, or the tokenizer has tokens that the model lacks.
        DivergedError: the loss is not a finite number.
    """
    stride = seq_len - 1 if stride is None else stride
    if not 1 <= stride < seq_len:
        raise InputError(f"stride must be from 1 to {seq_len - 1}, one less than seq_len; got {stride}")
    batch_size = max(1, 16_384 // seq_len) if batch_size is None else batch_size
    most = trained.model.config.vocab_size
    if len(trained.tokenizer) > most:
        raise InputError(f"the tokenizer in {trained.folder} has {len(trained.tokenizer)} tokens, the model {most}")
    model = trained.model.to(runtime.device).eval()
    if model.config.model_type == "llama" and not trained.joins_documents:
        model.set_attn_implementation("sdpa")  # transformers' own, with a mask where positions begin anew
    losses = torch.zeros(seq_len - 1, dtype=torch.float64, device=runtime.device)
    counts = torch.zeros(seq_len - 1, dtype=torch.int64, device="cpu")
    tally = Tally()
    with tempfile.TemporaryFile() as file:
        corpus = SpooledCorpus(file)
        spool(text, corpus, tally)
        for line in tally.lines():
            if report:
                report(line)
        pieces = _tokens(corpus, trained.tokenizer, advance)
        windows = strided(pieces, trained.tokenizer.bos_token_id, seq_len, stride)
        for batch, skipped in _batches(windows, batch_size):
            if trained.joins_documents:
                positions = torch.arange(batch.shape[1] - 1, device="cpu").expand(len(batch), -1)
            else:
                positions = separate_documents(batch[:, :-1], trained.tokenizer.eos_token_id)["position_ids"]
            with runtime.autocast():
                found = token_losses(model, batch.to(runtime.device), positions.to(runtime.device))
            before = positions[:, skipped:].flatten()
            losses.index_add_(0, before.to(runtime.device), found[:, skipped:].flatten().double())
            counts += torch.bincount(before, minlength=len(counts))
    nats, tokens = float(losses.sum()), int(counts.sum())
    if not math.isfinite(nats):
        raise DivergedError(f"the loss is {nats / tokens} on this text")
    bits_per_byte = nats / math.log(2) / corpus.total_bytes
    buckets = _buckets(losses.cpu(), counts)
    return Evaluation(corpus.documents, corpus.total_bytes, tokens, nats / tokens, bits_per_byte, buckets)


@torch.no_grad()
def token_losses(model: PreTrainedModel, windows: Tensor, positions: Tensor) -> Tensor:
    """Negative log-likelihoods [b, t − 1] in nats, float32, of all but the first tokens of windows [b, t] int64.

    `positions` [b, t − 1] begin anew where a document does. Logits are computed for some tokens at a time: those of a
    long window would be larger than the model.
    """
    hidden = model.base_model(input_ids=windows[:, :-1], position_ids=positions, use_cache=False).last_hidden_state
    head, targets = model.get_output_embeddings(), windows[:, 1:]
    rows = max(1, MOST_LOGITS // model.config.vocab_size)
    parts = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(head(part).float(), wanted, reduction="none") for part, wanted in parts]
    return torch.cat(losses).view(targets.shape)


def strided(pieces: Iterable[np.ndarray], before: int, seq_len: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows of up to `seq_len` tokens, each with how many of its predictions earlier windows have counted.

    A model predicts all but the first token of a window. A full window counts `stride` tokens, the first of them all.

    Args:
        pieces: the tokens [n] of a stream, in order.
        before: the token that the first one comes after.
        seq_len: tokens in a window.
        stride: from 1 to seq_len − 1.
    """
    held, counted = np.array([before]), 1  # tokens not yet out of reach, and how many of them have been counted
    waiting: list[np.ndarray] = []  # put behind `held` when there is a window of them: pieces may be far shorter
    for piece in pieces:
        waiting.append(piece)
        if len(held) + sum(map(len, waiting)) < seq_len:
            continue
        held, waiting = np.concatenate([held, *waiting]), []
        while len(held) >= seq_len:
            yield held[:seq_len], counted - 1
            held, counted = held[stride:], seq_len - stride
    held = np.concatenate([held, *waiting])
    if len(held) > counted:
        yield held, counted - 1


def _tokens(
    corpus: SpooledCorpus, tokenizer: PreTrainedTokenizerFast, advance: Callable[[int, int], None] | None
) -> Iterator[np.ndarray]:
    """The text in tokens, as a model is trained on it: an end-of-text token after every document."""
    encoder = tokenizer.backend_tokenizer
    encoder.encode_special_tokens = True  # what a text says of them is text
    done = 0
    for text, ends in corpus.pieces([(0, corpus.total_bytes)]):
        ids = encoder.encode(text, add_special_tokens=False).ids
        yield np.array([*ids, tokenizer.eos_token_id] if ends else ids, np.int64)
        done += len(text.encode())
        if advance:
            advance(done, corpus.total_bytes)


def _batches(windows: Iterable[tuple[np.ndarray, int]], size: int) -> Iterator[tuple[Tensor, int]]:
    """Up to `size` windows at a time that are as long and count as many tokens: [b, t] int64, and what they skip."""
    for (_, skipped), alike in groupby(windows, lambda window: (len(window[0]), window[1])):
        while batch := [tokens for tokens, _ in islice(alike, size)]:
            yield torch.from_numpy(np.stack(batch)), skipped


def _buckets(losses: Tensor, counts: Tensor) -> list[Bucket]:
    """Sums of losses [n] and numbers of tokens [n] at 1, 2, … n tokens before, by powers of two."""
    found, first = [], 1
    while first <= len(losses):
        last = min(2 * first - 1, len(losses))
        nats, tokens = float(losses[first - 1 : last].sum()), int(counts[first - 1 : last].sum())
        if tokens:
            found.append(Bucket(first, last, tokens, nats / tokens))
        first = last + 1
    return found
