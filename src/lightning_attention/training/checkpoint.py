"""Folders that are either whole or not there: written under another name, synced to disk, then renamed.

Every checkpoint is a Hugging Face folder (weights, configuration, tokenizer) with the state of the trainer and of the
optimizer beside it; `saving` writes them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from lightning_attention.errors import InputError
from lightning_attention.training.disk import writing

STATE_FILE = "trainer_state.pt"
FILES = "files.json"  # the names of what a run wrote into a folder: nothing else is deleted
# Names with this ending are unfinished or on their way out; nothing but `RunFolder.clear_leftovers` looks at them.
UNFINISHED = ".unfinished"
_NAME = re.compile(r"step_(\d{8})")


class State(TypedDict):
    """What a checkpoint holds besides model and optimizer; the position in the data follows from the step."""

    step: int
    planned_steps: int | None
    config: dict[str, Any]
    data_fingerprint: str
    record: dict[str, Any]
    learner: dict[str, Any]


@contextmanager
def atomic_folder(target: Path, *, listed: bool = True) -> Iterator[Path]:
    """Yield a new folder to fill; on leaving it gets the name `target`, all at once and on disk.

    A run knows its own files by the list of them that is written into the folder, unless `listed` is False.

    When the block raises, or the process dies at any point, `target` does not exist. Raises FileExistsError when it
    exists already, and DiskError for whatever fails because the disk is full.
    """
    unfinished = begin_folder(target)
    try:
        with writing(target):  # which tells how much room there was before what is unfinished is deleted
            yield unfinished
            finish_folder(target, listed=listed)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def begin_folder(target: Path) -> Path:
    """Make the folder in which `target` is written until it is whole. Raises FileExistsError and DiskError."""
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    unfinished = unfinished_name(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    return unfinished


def finish_folder(target: Path, *, listed: bool = True) -> None:
    """Sync what was begun to disk and give it its final name."""
    unfinished = unfinished_name(target)
    names = sorted(path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*"))
    if listed:
        (unfinished / FILES).write_text(json.dumps([*names, FILES]), encoding="utf-8")
    _sync_tree(unfinished)
    rename(unfinished, target)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name, on disk."""
    os.rename(path, target)
    _sync(target.parent)


def atomic_text(target: Path, text: str) -> None:
    """Replace a small file's content, all at once and on disk. Raises DiskError when it cannot be written."""
    unfinished = unfinished_name(target)
    with writing(target):
        unfinished.write_text(text, encoding="utf-8")
        _sync(unfinished)
        os.replace(unfinished, target)
        _sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder that `atomic_folder` made so that it never shows half of its files under its own name.

    Raises InputError when there is something else in it.
    """
    refuse_foreign_files(folder)
    doomed = unfinished_name(folder)
    remove(doomed)
    rename(folder, doomed)
    remove(doomed)


def refuse_foreign_files(folder: Path) -> None:
    """Raise InputError when there is something in a folder that `atomic_folder` did not make."""
    if others := foreign_files(folder):
        raise InputError(f"{folder} holds files that no run wrote ({', '.join(others)}); move them elsewhere")


def foreign_files(folder: Path) -> list[str]:
    """What is in a folder that `atomic_folder` did not make."""
    try:
        own = json.loads((folder / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        own = []
    return sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {*own})


def remove(path: Path) -> None:
    """Delete a file, a folder or a link to one, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unfinished_name(path: Path) -> Path:
    """What a file or folder is called until it is whole, and while it is being deleted."""
    return path.with_name(path.name + UNFINISHED)


def unfinished_checkpoints(root: Path) -> list[Path]:
    """What a killed process left of checkpoints under `root`."""
    found = root.glob("*" + UNFINISHED)
    return [path for path in found if _NAME.fullmatch(path.name.removesuffix(UNFINISHED))]


def checkpoint_path(root: Path, step: int) -> Path:
    """The folder of one step."""
    return root / f"step_{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Every whole checkpoint under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and those in which somebody has put files."""
    for path in checkpoints(root)[:-keep]:
        if not foreign_files(path):
            remove_folder(path)


def save_state(folder: Path, state: State) -> None:
    """Write the trainer's state: small tensors and plain values."""
    with (folder / STATE_FILE).open("wb") as file:  # rather than by name: a full disk is then an OSError that says so
        torch.save(state, file)


def load_state(folder: Path) -> State:
    """Read the trainer's state onto the CPU. Raises InputError when it is absent, damaged or another version's."""
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a training checkpoint: it has no {STATE_FILE}") from error
    except OSError as error:  # which says nothing of the file itself
        raise InputError(f"cannot read {folder / STATE_FILE}: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(f"{folder / STATE_FILE} is damaged ({type(error).__name__}); delete {folder}") from error
    if missing := sorted(State.__required_keys__ - state.keys()):
        raise InputError(
            f"{folder / STATE_FILE} has no {', '.join(missing)}: another version of lightning-attention wrote it. "
            "Resume with that version, or train anew with --overwrite"
        )
    return cast(State, state)


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
