"""Text from text: prompts are made into tokens, continued as a running batch, and given back piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tokenizers.decoders import DecodeStream

from lightning_attention.serving.engine import ContinuousBatch
from lightning_attention.serving.request import Request
from lightning_attention.serving.scheduler import Finished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lightning_attention.serving.model import DecoderModel

MAX_BATCH = 256


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how.

    Args:
        text: an empty one begins a new document.
        max_tokens: tokens to generate, at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample from the fewest tokens that hold this much probability.
        seed: of its own random numbers, which do not depend on the other prompts.
        ignore_eos: go on past the end of a document.
    """

    text: str
    max_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raise what the request would: raised in the middle of a stream it would cost the other prompts."""
        if not isinstance(self.text, str):
            raise TypeError(f"text is a {type(self.text).__name__}; it must be a string")
        Request([0], self.max_tokens, self.temperature, self.top_p, self.seed)


class Piece(NamedTuple):
    """What one token brought: new text of a prompt, by its index, and why it is the last, if it is.

    The text is empty while a character is not complete, and at the end of a document.
    """

    prompt: int
    text: str
    finished: Finished


class Generator:
    """A model and its tokenizer, ready to continue texts."""

    def __init__(self, model: DecoderModel, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take a model, on whatever device it is, and a fast tokenizer with a bos_token and an eos_token."""
        self._model = model
        self._tokenizer = tokenizer

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
                request = self._request(prompts[submitted])
                number = batch.submit(request)
                # After the prompt: some tokenizers leave the space out that a text begins with.
                decoders[number] = DecodeStream(list(request.prompt), skip_special_tokens=True)
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
