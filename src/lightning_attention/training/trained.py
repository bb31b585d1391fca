"""A trained model as other commands take it: out of a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_attention.errors import InputError
from lightning_attention.models.pretrained import load_model, load_tokenizer, save_model
from lightning_attention.training.checkpoint import atomic_folder, find_model


class Trained(NamedTuple):
    """A model in float32 on the CPU, its tokenizer, and the folder that both are from."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def open_trained(path: Path) -> Trained:
    """The model at `path`: a run's newest checkpoint, one of its checkpoints, or a Hugging Face folder.

    Raises InputError when there is none, or it cannot be read or lacks weights.
    """
    folder = find_model(path)
    return Trained(folder, load_model(folder), load_tokenizer(folder))


def export(path: Path, target: Path) -> Trained:
    """Write the model at `path` into a new or empty folder as transformers reads it; what was written.

    It is there whole or not at all: configuration, weights, tokenizer and generation settings, and nothing of a
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
