"""Generate text from the recurrent state: the memory does not grow with the length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from lightning_attention.training.config import InputError
from lightning_attention.training.model import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lightning_attention.models.transnormer import TransnormerCache, TransnormerForCausalLM

# A long prompt is read in pieces: activations take memory for one piece, whatever the prompt's length.
PREFILL_TOKENS = 2048


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
        return cls(model, tokenizer)

    @torch.inference_mode()
    def stream(
        self,
        prompts: list[str],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Iterator[list[str]]:
        """Continue every prompt, all of them at once.

        Args:
            prompts: N texts of any lengths; an empty one begins a new document.
            max_tokens: tokens to generate for each, at most.
            temperature: divides the logits; 0 takes the likeliest token.
            top_p: sample from the fewest tokens that hold this much probability.
            seed: prompt i draws its randomness from `seed + i`, so its text does not depend on the other prompts.
            ignore_eos: go on past the end of a document.

        Yields:
            After every step the new text of every prompt, N strings. A string is empty while a character is not
            complete and after the prompt's text has ended. It ends when all have.
        """
        decoders = [DecodeStream(skip_special_tokens=True) for _ in prompts]
        randoms = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        ended = [False] * len(prompts)
        logits, cache = self._prefill(prompts)
        for _ in range(max_tokens):
            draws = torch.tensor([torch.rand((), generator=random) for random in randoms], device=logits.device)
            tokens = sample(logits, temperature, top_p, draws)
            texts = []
            for row, token in enumerate(tokens.tolist()):
                ended[row] |= token == self._tokenizer.eos_token_id and not ignore_eos
                texts.append("" if ended[row] else decoders[row].step(self._tokenizer.backend_tokenizer, token) or "")
            yield texts
            if all(ended):
                return
            outputs = self._model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
            logits = self._no_padding(outputs.logits[:, -1])

    def _prefill(self, prompts: list[str]) -> tuple[Tensor, TransnormerCache | None]:
        """The logits after each prompt, [N, V] float32, and the states there."""
        encoded = [self._tokenizer.encode(prompt) or [self._tokenizer.bos_token_id] for prompt in prompts]
        longest = max(map(len, encoded))
        # Padded on the left, so that every prompt's last token is in the last column; the model skips padding.
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in encoded], device=self._model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=ids.device)
        cache: TransnormerCache | None = None
        for start in range(0, longest, PREFILL_TOKENS):
            piece = slice(start, start + PREFILL_TOKENS)
            outputs = self._model(
                input_ids=ids[:, piece],
                attention_mask=mask[:, piece],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = outputs.past_key_values
        return self._no_padding(outputs.logits[:, -1]), cache

    def _no_padding(self, logits: Tensor) -> Tensor:
        """[N, V] logits in float32, with the padding token ruled out: it stands for no text."""
        logits = logits.float()
        if self._tokenizer.pad_token_id not in (None, self._tokenizer.eos_token_id):
            logits[:, self._tokenizer.pad_token_id] = -torch.inf
        return logits


def sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    """One token for each row, by inverting the cumulative distribution over the likeliest tokens.

    Args:
        logits: [N, V] float32.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the fewest tokens that hold this much probability, one at least.
        draws: [N] float32, uniform in [0, 1).

    Returns:
        [N] int64 token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    kept = (cumulative - probabilities < top_p) & (probabilities > 0)
    kept = kept.sum(-1, keepdim=True).clamp_min(1)
    total = cumulative.gather(-1, kept - 1)
    chosen = torch.searchsorted(cumulative, draws[:, None] * total, right=True)
    return tokens.gather(-1, chosen.minimum(kept - 1)).squeeze(-1)
