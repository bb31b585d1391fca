"""How the model continues a prompt, every so many steps: samples.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_attention.training.checkpoint import remove
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.metrics import MetricsLog
from lightning_attention.training.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lightning_attention.training.learner import Learner

TOKENS = 64  # of a sample


class Samples:
    """Texts by step. No random number is drawn for them: a run with samples is bit for bit the run without."""

    def __init__(self, config: TrainConfig, schedule: Schedule, tokenizer: PreTrainedTokenizerFast) -> None:
        """Tokenize the prompt; an empty one begins a document."""
        self._every, self._prompt = config.sample_every, config.sample_prompt
        self._schedule, self._tokenizer = schedule, tokenizer
        self._log: MetricsLog | None = None

    def open(self, path: Path | None, resume_step: int | None) -> Samples:
        """Start the file, whose lines after `resume_step` go. There is none while nothing is sampled.

        None: another process writes it.
        """
        if path is None:
            return self
        if self._every or (resume_step is not None and path.exists()):
            self._log = MetricsLog(path, resume_step)
        else:
            remove(path)
        return self

    def close(self) -> None:
        """Close the file."""
        if self._log:
            self._log.close()

    def due(self, step: int) -> bool:
        """Whether there is to be a sample after so many steps."""
        return self._every > 0 and self._schedule.is_due(self._every, step)

    def take(self, learner: Learner) -> str:
        """How the model continues the prompt now. If it is sharded, every rank must call."""
        prompt = self._tokenizer.encode(self._prompt, split_special_tokens=True) or [self._tokenizer.bos_token_id]
        new = greedy(learner, prompt, TOKENS, end=self._tokenizer.eos_token_id)
        # Some tokenizers leave the space out that a text begins with, so what is new is not decoded alone.
        before, text = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *new]))
        return text[len(before) :]

    def write(self, step: int, text: str) -> str:
        """A line of the file. Returns the text with the prompt before it."""
        if self._log:
            self._log.write({"step": step, "prompt": self._prompt, "text": text})
        return self._prompt + text


@torch.no_grad()
def greedy(learner: Learner, prompt: list[int], count: int, *, end: int) -> list[int]:
    """The likeliest continuation of a prompt, token by token: `count` tokens, or fewer where the document ends.

    It takes `count` forward passes over the prompt and room for all tokens. Every model can do that, sharded or not;
    all passes have one shape, and nothing is read on the host. In a causal model, later tokens change nothing.
    """
    model, device = learner.model, learner.runtime.device
    ids = torch.full((1, len(prompt) + count), end, device=device)
    ids[0, : len(prompt)] = torch.tensor(prompt, device=device)
    model.eval()
    for place in range(len(prompt), len(prompt) + count):
        with learner.runtime.autocast():
            last = torch.tensor([place - 1], device=device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=last).logits
        ids[0, place] = logits[0, -1].argmax()
    model.train()
    new: list[int] = ids[0, len(prompt) :].tolist()
    return new[: new.index(end)] if end in new else new
