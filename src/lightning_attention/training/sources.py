"""Which files there are to read, and a tally of what was read, what was not, and why."""

from __future__ import annotations

import glob
import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_attention.errors import InputError
from lightning_attention.training.run_folder import is_run
from lightning_attention.training.shards import is_token_folder


@dataclass
class Names:
    """How many things of one kind there are, and the names of the first three."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < 3:
            self.first.append(name)

    def __str__(self) -> str:
        """For a line of text."""
        return ", ".join(self.first) + (", ..." if self.count > len(self.first) else "")


class Tally:
    """What was read, by encoding, and what was left out, by reason."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.read: dict[str, Names] = defaultdict(Names)
        self.guessed: dict[str, tuple[str, str]] = {}  # by encoding: the first file, and words from it
        self.skipped: dict[str, Names] = defaultdict(Names)
        self.damaged: dict[str, int] = {}

    def lines(self) -> list[str]:
        """In words, for a person to read."""
        by_encoding = [
            f"{names.count:,} {name}" + ("" if name == "utf-8" else f" ({names})") for name, names in self.read.items()
        ]
        files = sum(names.count for names in self.read.values())
        found = [f"read {files:,} {'file' if files == 1 else 'files'}: {', '.join(by_encoding)}"] if files else []
        found += [
            f'{name} is a guess: {path} reads "{words}" in it; if that is wrong, name the encoding with --encoding'
            for name, (path, words) in self.guessed.items()
        ]
        found += [f"left out {names.count:,}, {reason}: {names}" for reason, names in self.skipped.items()]
        found += [
            f"{path} is damaged: {count:,} sequences of bytes that are no UTF-8 became U+FFFD"
            for path, count in self.damaged.items()
        ]
        return found


def shown(path: object) -> str:
    """A path for a person to read, whatever bytes its name has."""
    return str(path).encode("utf-8", "backslashreplace").decode()


class Finder:
    """Finds files, each once, however many names and links lead to it."""

    def __init__(self, tally: Tally) -> None:
        """Found and left out so far: nothing."""
        self._tally = tally
        self._seen: set[tuple[int, int]] = set()

    def find(self, name: str) -> Iterator[tuple[Path, bool]]:
        """The files of a file's name, a folder or a glob, each with whether it was named itself.

        A folder's hidden files and the folders of earlier runs are left out. Raises InputError when there is nothing
        of that name, or it cannot be read.
        """
        path = Path(name)
        try:
            if is_token_folder(path):
                raise InputError(f"{shown(path)} holds tokens, not text; `train` takes such a folder as its only INPUT")
            if path.is_dir():
                os.scandir(path).close()  # says so now where it cannot be read
                yield from ((found, False) for found in sorted(self._walk(path)) if self._is_new(found))
            elif path.exists():
                if self._is_new(path, named=True):
                    yield path, True
            else:
                yield from ((found, False) for found in self._matches(name) if self._is_new(found))
        except OSError as error:
            raise InputError(f"cannot read {shown(error.filename or name)}: {error.strerror}") from error

    def _matches(self, pattern: str) -> list[Path]:
        found = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match))
        if not found:
            what = "no file matches" if glob.has_magic(pattern) else "no such file or folder:"
            raise InputError(f"{what} {pattern}")
        kept = []
        for path in found:
            run = next((parent for parent in path.parents if is_run(parent)), None)
            if run:
                self._tally.skipped["written by an earlier run"].add(shown(path))
            else:
                kept.append(path)
        return kept

    def _walk(self, root: Path) -> Iterator[Path]:
        if is_run(root):
            self._tally.skipped["a folder of an earlier run"].add(shown(root))
            return
        if is_token_folder(root):
            self._tally.skipped["a folder of tokens"].add(shown(root))
            return
        try:
            entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
        except OSError as error:
            self._tally.skipped[f"cannot be read ({error.strerror})"].add(shown(root))
            return
        for entry in entries:
            path = Path(entry.path)
            if not entry.is_dir():
                yield path
            elif self._is_new(path):  # a folder that a link leads back to is not walked again
                yield from self._walk(path)

    def _is_new(self, path: Path, named: bool = False) -> bool:
        try:
            about = path.stat()
        except OSError as error:  # a link that leads nowhere
            self._tally.skipped[f"cannot be read ({error.strerror})"].add(shown(path))
            return False
        if named and stat.S_ISFIFO(about.st_mode):  # as a shell's <(command)
            return True
        if not stat.S_ISDIR(about.st_mode) and not stat.S_ISREG(about.st_mode):
            if named:
                raise InputError(f"{shown(path)} is neither a file, a folder nor a pipe")
            self._tally.skipped["neither a file nor a folder"].add(shown(path))
            return False
        identity = (about.st_dev, about.st_ino)
        if identity in self._seen:
            self._tally.skipped["the same file or folder by another name"].add(shown(path))
            return False
        self._seen.add(identity)
        return True
