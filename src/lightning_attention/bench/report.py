"""The JSON file of a benchmark: the machine it ran on, the command, and one flat record for each measurement."""

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_attention.bench.peers import Peer
from lightning_attention.errors import InputError

Record = dict[str, Any]


def first_process() -> bool:
    """Whether this process reports: of those that torchrun starts, the first does."""
    return os.environ.get("RANK", "0") == "0"


def device_name(device: torch.device) -> str:
    """The device's own name; for a CPU with the number of threads, without which its times mean nothing."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def slug(device: torch.device) -> str:
    """The device's name for a file: ``cpu``, ``nvidia-h200``."""
    return "cpu" if device.type == "cpu" else device_name(device).lower().replace(" ", "-")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _answer(*command: str) -> str | None:
    """What a command prints, or None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def package_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of this source, with ``+`` where tracked files differ from it.

    GIT_COMMIT in the environment comes first: for a copy of the source that is no checkout, or lies in another one.
    """
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    here = Path(__file__).parent
    git = ("git", "-C", str(here))
    if _answer(*git, "ls-files", "--error-unmatch", Path(__file__).name) is None:  # someone else's repository, or none
        return None
    head = _answer(*git, "rev-parse", "HEAD")
    changed = _answer(*git, "status", "--porcelain", "--untracked-files=no")
    return head if head is None or changed is None else f"{head}+"


def driver() -> str | None:
    """The GPU driver's version, as its own tool gives it."""
    return _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def environment(
    device: torch.device, peers: Iterable[Peer] = (), command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Device, versions, command, commit and date: what someone needs to get the same figures.

    ``command``: its words, ``lightning-attention`` with this process's arguments if not given.
    """
    import lightning_attention

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command or ["lightning-attention", *sys.argv[1:]]),
        "commit": commit(),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "driver": driver() if device.type == "cuda" else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "lightning_attention": lightning_attention.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": package_version("triton"),
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "transformers": package_version("transformers"),
        "peers": {p.package: package_version(p.package) for p in peers if p.package != "torch"},
    }


class Report:
    """A benchmark's results, written to ``path`` after every record, so that a run cut short leaves what it has."""

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path, self.environment = path, environment
        self.records: list[Record] = []
        self._write()

    @classmethod
    def read(cls, path: Path) -> "Report":
        """A finished report, from its file. Raises InputError, which names it, where it cannot be read as one."""
        found = cls.__new__(cls)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.path, found.environment, found.records = path, content["environment"], content["records"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no record of a benchmark: {type(error).__name__}: {error}") from error
        if wrong := _wrong(found.environment, found.records):
            raise InputError(f"{path} is no record of a benchmark: {wrong}")
        return found

    def add(self, suite: str, **record: Any) -> Record:
        """Keep a record; floats keep six digits, more than a timer has."""
        entry = {"suite": suite} | {key: _rounded(value) for key, value in record.items()}
        self.records.append(entry)
        self._write()
        return entry

    def find(self, suite: str, **wanted: Any) -> list[Record]:
        """The suite's records that have all the wanted values."""
        return [r for r in self.records if r["suite"] == suite and all(r.get(k) == v for k, v in wanted.items())]

    def _write(self) -> None:
        if not first_process():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps({"environment": self.environment, "records": self.records}, indent=1) + "\n")
        temporary.replace(self.path)


def _wrong(environment: Any, records: Any) -> str | None:
    """What a file has in place of a report's two parts, or None."""
    if not isinstance(environment, dict):
        return f"environment is a {type(environment).__name__}; it must be an object"
    if not isinstance(records, list):
        return f"records is a {type(records).__name__}; it must be a list"
    for place, record in enumerate(records):
        if not (isinstance(record, dict) and isinstance(record.get("suite"), str)):
            return f"records[{place}] is {str(record)[:40]}; it must be an object with a suite"
    return None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)  # JSON knows neither nan nor inf
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
