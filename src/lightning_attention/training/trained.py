"""A trained model for the other commands: from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_attention.errors import InputError
from lightning_attention.models.llama import ServedLlama
from lightning_attention.models.pretrained import load_model, load_tokenizer, save_model
from lightning_attention.serving import DecoderModel
from lightning_attention.serving.text import Prompt
from lightning_attention.training.checkpoint import STATE_FILE, atomic_folder, find_model, load_state


class Trained(NamedTuple):
    """A model in float32 on the CPU, its tokenizer, and the folder that both come from.

    joins_documents: whether it was trained with `documents = "joined"`.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    joins_documents: bool = False

    def served(self, prompts: Iterable[Prompt]) -> DecoderModel:
        """The model as `serving` runs it. A Llama gets room for the longest of the prompts and what comes after it."""
        if self.model.config.model_type != "llama":
            return self.model
        ids = ((self.tokenizer.encode(p.text, split_special_tokens=True), p.max_tokens) for p in prompts)
        return ServedLlama(self.model, max(max(1, len(prompt)) + more for prompt, more in ids))


def open_trained(path: Path) -> Trained:
    """The model at `path`: a run's newest checkpoint, one of its checkpoints, or a Hugging Face folder.

    Raises InputError when there is none, or it cannot be read or lacks weights.
    """
    folder = find_model(path)
    joins = (folder / STATE_FILE).is_file() and load_state(folder)["config"].get("documents") == "joined"
    return Trained(folder, load_model(folder), load_tokenizer(folder), joins)


def export(path: Path, target: Path) -> Trained:
    """Write the model at `path` into a new or empty folder as transformers reads it; what was written.

    The folder appears whole or not at all: configuration, weights, tokenizer and generation settings, and nothing of a
    trainer's. Raises InputError when `target` holds something or `path` no model, DiskError when there is no room.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already and not an empty folder; choose a new or an empty one")
    trained = open_trained(path)
    if target.exists():
        target.rmdir()
    with atomic_folder(target, listed=False) as folder:
        save_model(trained.model, folder)
        trained.tokenizer.save_pretrained(folder)
    return trained
