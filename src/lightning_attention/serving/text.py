"""Generate text from the recurrent state: the memory does not grow with the length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from tokenizers.decoders import DecodeStream

from lightning_attention.errors import InputError
from lightning_attention.models.transnormer.pretrained import load_model
from lightning_attention.serving import ContinuousBatch, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lightning_attention.models.transnormer import TransnormerForCausalLM

MAX_BATCH = 256


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how.

    Args:
        text: an empty one begins a new document.
        max_tokens: tokens to generate, at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample from the fewest tokens that hold this much probability.
        seed: what its randomness is drawn from; the other prompts have no part in it.
        ignore_eos: go on past the end of a document.
    """

    text: str
    max_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raise what a request would: in the middle of a stream it would cost the other prompts."""
        if not isinstance(self.text, str):
            raise TypeError(f"text is a {type(self.text).__name__}; it must be a string")
        Request([0], self.max_tokens, self.temperature, self.top_p, self.seed)


class Piece(NamedTuple):
    """What one token brought: new text of a prompt, by its index, and why it is the last, if it is.

    The text is empty while a character is not complete, and at the end of a document.
    """

    prompt: int
    text: str
    finished: Literal["stop", "length"] | None


class Generator:
    """A model and its tokenizer, ready to continue texts."""

    def __init__(self, model: TransnormerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take a model, on whatever device it is, and a fast tokenizer."""
        self._model = model.eval()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Generator:
        """From a Hugging Face folder, which every checkpoint is. Raises InputError when it cannot be read."""
        from transformers import AutoTokenizer

        model = load_model(folder).to(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise InputError(f"cannot load the tokenizer in {folder}: {error}") from error
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer in {folder} has no bos_token or no eos_token; texts begin and end with them"
            )
        return cls(model, tokenizer)

    def stream(self, prompts: Sequence[Prompt], *, max_batch: int = MAX_BATCH) -> Iterator[list[Piece]]:
        """Continue every prompt, ``max_batch`` of them at a time; a waiting one takes the place of one that ended.

        A prompt's text does not depend on the other prompts, but for the rounding of sums.

        Yields:
            After every step that brought tokens, what each of them brought. It ends when every prompt has its last.
        """
        pad, eos = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        batch = ContinuousBatch(
            self._model,
            max_batch=min(max_batch, len(prompts)) or 1,
            suppress=[] if pad in (None, eos) else [pad],  # padding stands for no text
        )
        decoders: dict[int, DecodeStream] = {}
        submitted = 0
        while submitted < len(prompts) or batch.busy:
            # Only as many prompts are made into tokens as can run.
            while submitted < len(prompts) and batch.room:
                number = batch.submit(self._request(prompts[submitted]))
                decoders[number] = DecodeStream(skip_special_tokens=True)
                submitted += 1
            pieces = []
            for number, token, finished in batch.step():
                text = None
                if finished != "stop":
                    text = decoders[number].step(self._tokenizer.backend_tokenizer, token)
                if finished:
                    del decoders[number]
                pieces.append(Piece(number, text or "", finished))
            if pieces:
                yield pieces

    def _request(self, prompt: Prompt) -> Request:
        return Request(
            # "<|endoftext|>" in a prompt is text, as it is in the text that was trained on.
            self._tokenizer.encode(prompt.text, split_special_tokens=True) or [self._tokenizer.bos_token_id],
            prompt.max_tokens,
            prompt.temperature,
            prompt.top_p,
            prompt.seed,
            () if prompt.ignore_eos else (self._tokenizer.eos_token_id,),
        )
