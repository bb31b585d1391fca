"""A model as a Hugging Face folder, for commands: errors are one line, and transformers draws no progress bars."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from lightning_attention.errors import InputError
from lightning_attention.models.llama import ATTENTION
from lightning_attention.models.presets import MODELS, classes


def load_model(folder: Path) -> PreTrainedModel:
    """The model in a Hugging Face folder, in float32 on the CPU.

    Raises InputError when it cannot be read, is of another kind than `MODELS`, or lacks weights.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if found not in MODELS:
            raise InputError(f"{folder} holds a {found}; this needs a {' or a '.join(MODELS)}")
        with _no_progress_bar():
            model, about = classes(found)[1].from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=ATTENTION,
                local_files_only=True,
                output_loading_info=True,
            )
    except InputError:
        raise
    except Exception as error:  # a damaged file raises whatever its reader raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot load the model in {folder}: {reason}") from error
    if missing := sorted(about["missing_keys"]):  # for which transformers draws random numbers
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"the model in {folder} lacks {len(missing)} of its weights: {names}")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a Hugging Face folder. Raises InputError when it cannot be read, or begins and ends no text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"cannot load the tokenizer in {folder}: {error}") from error
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {folder} has no bos_token or no eos_token; texts begin and end with them")
    return tokenizer


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights and the configuration as a Hugging Face folder."""
    with _no_progress_bar():
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # which safetensors lets nobody but its owner read
        shutil.copymode(folder / "config.json", weights)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing its own bars over the trainer's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
