"""The folder of a run: known by a marker, held by one process at a time; files that no run wrote are never touched."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_attention.errors import InputError
from lightning_attention.training import checkpoint

MARKER = "lightning_attention_run.json"
LOCK = "lightning_attention_run.lock"


class RunFolder:
    """Where a run's files are, and the right to write them."""

    def __init__(self, root: Path) -> None:
        """Name the files; nothing is made yet."""
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.tokens = root / "tokens"
        self.fresh_tokens = root / "tokens.new"  # until the run before, if any, may go
        self.metrics = root / "metrics.jsonl"
        self.samples = root / "samples.jsonl"
        self.plot = root / "loss.png"
        self.settings = root / "config.toml"
        self._marker = root / MARKER
        self._lock_file = root / LOCK
        self._lock = FileLock(self._lock_file)

    def claim(self) -> None:
        """Make the folder and hold it until `release`, or until the process ends, however it ends.

        Raises:
            InputError: it cannot be made or written, holds files that no run wrote, or another process holds it.
            DiskError: there is no room for the marker.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {self.root}: {error.strerror}") from error
        try:
            self._refuse_foreign_files()
            if not os.access(self.root, os.W_OK):
                raise InputError(f"cannot write in the folder {self.root}")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            if not self._lock_file.exists():  # filelock takes a folder that cannot be written for one that is held
                raise InputError(f"cannot write in the folder {self.root}") from error
            raise InputError(
                f"{self.root} is in use: {self._holder()} trains in it; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            raise InputError(f"cannot write in the folder {self.root}: {error.strerror}") from error
        about = {
            "made_by": "lightning-attention train",
            "process": os.getpid(),
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            checkpoint.atomic_text(self._marker, json.dumps(about, indent=1) + "\n")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return checkpoint.checkpoint_path(self.checkpoints, step)

    def require_checkpoint(self) -> None:
        """Raise InputError when there is nothing to go on from."""
        if not checkpoint.checkpoints(self.checkpoints):
            raise InputError(f"there is no checkpoint in {self.root} to go on from; --auto-resume starts where none is")

    def find_start(self, resume: bool, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, or None for a new run; what a killed process left unfinished is deleted.

        Raises InputError when there is a run that is to be neither resumed nor replaced, or that cannot be replaced.
        """
        found = checkpoint.checkpoints(self.checkpoints)
        if found and not resume and not overwrite:
            raise InputError(f"{self.root} holds checkpoints; add --resume to go on or --overwrite to start again")
        self.clear_leftovers()
        if resume and found:
            return found[-1]
        for folder in self._earlier_run():
            checkpoint.refuse_foreign_files(folder)
        return None

    def replace_earlier_run(self) -> None:
        """Delete the files of an earlier run, now that the new one's tokens are in `fresh_tokens`."""
        for folder in self._earlier_run():
            checkpoint.remove_folder(folder)
        checkpoint.rename(self.fresh_tokens, self.tokens)

    def _earlier_run(self) -> list[Path]:
        # Token files without a checkpoint may be of another text, and are cheap to make again.
        return [*checkpoint.checkpoints(self.checkpoints), *([self.tokens] if self.tokens.exists() else [])]

    def clear_leftovers(self) -> None:
        """Delete what a killed process left unfinished."""
        files = (
            self._marker, self.metrics, self.samples, self.plot, self.settings, self.tokens, self.fresh_tokens,
        )  # fmt: skip
        for path in (*map(checkpoint.unfinished_name, files), *checkpoint.unfinished_checkpoints(self.checkpoints)):
            checkpoint.remove(path)
        checkpoint.remove(self.fresh_tokens)

    def kept(self) -> str:
        """What the run can be resumed from, in words."""
        if found := checkpoint.checkpoints(self.checkpoints):
            return f"{found[-1]} is whole, and --resume goes on from it"
        return "no checkpoint had been written yet"

    def _refuse_foreign_files(self) -> None:
        if self._marker.exists():
            return
        own = {LOCK, checkpoint.unfinished_name(self._marker).name}  # of a process killed before it wrote the marker
        foreign = sorted(path.name for path in self.root.iterdir() if path.name not in own)
        if foreign:
            names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise InputError(f"{self.root} holds files that no run wrote ({names}); choose a new or an empty folder")

    def _holder(self) -> str:
        try:
            about = json.loads(self._marker.read_text(encoding="utf-8"))
            return f"process {about['process']} on {about['host']}, since {about['since']},"
        except (OSError, ValueError, KeyError):  # it has just begun
            return "another process"


def is_run(folder: Path) -> bool:
    """Whether a run wrote this folder."""
    return os.path.isfile(folder / MARKER)  # Path.is_file raises where the folder cannot be searched
