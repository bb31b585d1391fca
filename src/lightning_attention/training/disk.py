"""What is said when something cannot be written: which file, why, and how much room is left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_attention.errors import DiskError, InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever a writer raises where a disk fails it into a DiskError that names `path`."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None or isinstance(error, (DiskError, InputError)):  # a text that cannot be read is no full disk
            raise
        raise DiskError(f"cannot write {path}: {reason}{_room(path)}") from error


def _reason(error: BaseException | None) -> str | None:
    """Why the disk failed, or None for an error that has nothing to do with it."""
    first = str(error).partition("\n")[0]
    # PyTorch raises RuntimeError on top of the OSError that it met; safetensors and tokenizers have kinds of their own.
    of_a_library = type(error).__name__ == "SafetensorError" or "os error" in first or "PytorchStreamWriter" in first
    cause = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return first if of_a_library else None


def _room(path: Path) -> str:
    for folder in (path, *path.parents):
        if folder.is_dir():
            return f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free there)"
    return ""
