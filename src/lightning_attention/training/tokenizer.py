"""Byte-level BPE: every text has an encoding, and decoding gives back its bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END = "<|padding|>", "<|endoftext|>"
PAD_ID, END_ID = 0, 1
# A model trained on plain text knows no roles: a conversation is the text of its messages, one after the other.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"


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


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """[V] int64: how many bytes of text each token stands for; 0 for the special tokens."""
    # In the byte-level alphabet one character stands for one byte.
    lengths = [len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())]
    lengths[PAD_ID] = lengths[END_ID] = 0
    return np.array(lengths, dtype=np.int64)


def as_pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers` saves and loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=END,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # so that a batch of prompts goes on from its last column
        chat_template=CHAT_TEMPLATE,
    )
