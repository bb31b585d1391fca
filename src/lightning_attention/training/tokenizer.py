"""Byte-level BPE, which encodes every text and decodes it to the same bytes, and existing tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_attention.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END = "<|padding|>", "<|endoftext|>"
PAD_ID, END_ID = 0, 1
# What others call the token that ends a text, where nothing beside a tokenizer.json says it.
ENDS = (END, "</s>", "<eos>", "<|end_of_text|>")
# A model trained on plain text knows no roles: a conversation is the text of its messages, one after the other.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"


def require_vocabulary(vocab_size: int) -> None:
    """Raise InputError when a tokenizer cannot have so few entries."""
    if vocab_size < 258:
        raise InputError(f"vocab_size must be at least 258: 256 bytes and 2 special tokens; got {vocab_size}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on `texts`; fewer than `vocab_size` entries come out when the text has too few pairs to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The corpus may talk about "<|endoftext|>"; only the trainer and the generator place the real one.
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> tuple[Tokenizer, int, int | None]:
    """A tokenizer.json, or the one in a folder, with the token that ends a text and the one that pads a batch, if any.

    tokenizer_config.json beside it names them. Without that file the end is a token with one of the usual names. Raises
    InputError when the tokenizer cannot be read, or has no such token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    beside = file.with_name("tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        named = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"cannot read the tokenizer {file}: {error}") from error
    ends = [token] if (token := _content(named.get("eos_token"))) else ENDS
    end = next((index for token in ends if (index := tokenizer.token_to_id(token)) is not None), None)
    if end is None:
        raise InputError(
            f"the tokenizer {file} has no token that ends a text: {' or '.join(ends)}; "
            "give a folder whose tokenizer_config.json names it as eos_token"
        )
    pad = tokenizer.token_to_id(_content(named.get("pad_token")) or PAD)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # which may add tokens of its own at the beginning of a text
    tokenizer.encode_special_tokens = True
    # The embedding of padding stays zero, which that of the end must not.
    return tokenizer, end, None if pad == end else pad


def _content(token: str | dict[str, str] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest token id plus 1: some vocabularies have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """[V] int64: how many bytes of text each token stands for; 0 for the special tokens.

    Exact for byte-level vocabularies and for those that write a space as ▁ and lone bytes as <0x0A>.
    """
    tokens = [tokenizer.id_to_token(i) or "" for i in range(vocabulary_size(tokenizer))]
    if "ByteLevel" in str(tokenizer.decoder):  # one character stands for one byte
        lengths = [len(token) for token in tokens]
    else:
        lone_byte = re.compile("<0x[0-9A-F]{2}>")
        lengths = [1 if lone_byte.fullmatch(token) else len(token.replace("▁", " ").encode()) for token in tokens]
    for index, token in tokenizer.get_added_tokens_decoder().items():
        if token.special:
            lengths[index] = 0
    return np.array(lengths, dtype=np.int64)


def as_pretrained(tokenizer: Tokenizer, end_id: int = END_ID, pad_id: int | None = PAD_ID) -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers` saves and loads it, with the tokens that end a text and pad a batch."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=None if pad_id is None else tokenizer.id_to_token(pad_id),
        bos_token=tokenizer.id_to_token(end_id),
        eos_token=tokenizer.id_to_token(end_id),
        clean_up_tokenization_spaces=False,
        padding_side="left",  # so that a batch of prompts goes on from its last column
        chat_template=CHAT_TEMPLATE,
    )
