"""Folders that are either whole or not there: written under another name, synced to disk, then renamed.

Every checkpoint is a Hugging Face folder (weights, configuration, tokenizer) with the trainer's state beside it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_attention.training.config import InputError

STATE_FILE = "trainer_state.pt"
# Names with this ending are unfinished or on their way out; nothing but `clear_leftovers` looks at them.
UNFINISHED = ".unfinished"
_NAME = re.compile(r"step_(\d{8})")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder to fill; on leaving it gets the name `target`, all at once and on disk.

    When the block raises, or the process dies at any point, `target` does not exist. Raises FileExistsError when it
    exists already.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        _sync_tree(unfinished)
        os.rename(unfinished, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def atomic_text(target: Path, text: str) -> None:
    """Replace a small file's content, all at once and on disk."""
    unfinished = target.with_name(target.name + UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    _sync(unfinished)
    os.replace(unfinished, target)
    _sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that it never shows half of its files under its own name."""
    doomed = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    _sync(folder.parent)
    shutil.rmtree(doomed)


def clear_leftovers(root: Path) -> None:
    """Delete what a killed process left unfinished."""
    for path in root.glob(f"*{UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def checkpoint_path(root: Path, step: int) -> Path:
    """The folder of one step."""
    return root / f"step_{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Every whole checkpoint under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(root)[:-keep]:
        remove_folder(path)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the trainer's state: tensors and plain values."""
    torch.save(state, folder / STATE_FILE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read the trainer's state onto the CPU. Raises InputError when the folder has none or it is damaged."""
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a training checkpoint: it has no {STATE_FILE}") from error
    except Exception as error:
        raise InputError(f"{folder / STATE_FILE} is damaged ({type(error).__name__}); delete {folder}") from error
    return state


def find_model(path: Path) -> Path:
    """The Hugging Face folder at `path`: that folder itself, or a run's newest checkpoint. Raises InputError."""
    if (path / "config.json").is_file():
        return path
    for root in (path / "checkpoints", path):
        if found := checkpoints(root):
            return found[-1]
    if not path.is_dir():
        raise InputError(f"no such folder: {path}")
    raise InputError(f"{path} holds no model: neither a config.json nor checkpoints")


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Push a file's or folder's content to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
