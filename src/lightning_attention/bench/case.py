"""A case: something to measure, and how its records are shown; and one way to run all cases."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_attention.bench.peers import Peer, is_ours
from lightning_attention.bench.render import Figure, Table
from lightning_attention.bench.report import Record, Report, environment, first_process, slug
from lightning_attention.ops import backends

Shown = Table | Figure | str
RESULTS = ("ms", "us", "error", "skipped")  # the first of these is what came out


class OptionError(ValueError):
    """An option that cannot be used; ``option`` names it."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass
class Run:
    """What a case gets: where to measure, how much (``scale``, one of its own), whom to compare with, where to report.

    ``peers`` are other people's implementations, those that have one of the case's operations and were asked for.
    ``only``: the names of the scale's rows that were asked for, or None for all.
    """

    report: Report
    device: torch.device
    scale: Any
    peers: Sequence[Peer] = ()
    backend: str | None = None
    say: Callable[[str], object] = field(default=partial(print, flush=True))
    only: Collection[str] | None = None

    def add(self, suite: str, peer: Peer | None = None, **record: Any) -> None:
        """Put a record, of an implementation if given, into the report, and print it."""
        if peer is not None:
            record = {"implementation": peer.name, "label": peer.label} | record
        words = []
        for key, value in self.report.add(suite, **record).items():
            if key not in ("suite", "label", "first_call_s", "peak_bytes"):
                words.append(f"{value}" if isinstance(value, str) and key not in RESULTS else f"{key} {value}")
            if key in RESULTS:
                break
        self.say("  ".join(words))


@dataclass(frozen=True)
class Case:
    """``measure`` adds records to a report, and ``show`` turns them into tables, sentences and at most one figure.

    ``scales``: the sizes for ``"cpu"`` and ``"cuda"``, and for ``"cpu quick"`` and ``"cuda quick"`` where ``--quick``
    applies. ``operations``: those that a peer must have to take part. ``peers``: the names of those that take part
    when none are named. ``backends``: whether ``--backend`` applies. ``needs``: packages besides torch.
    ``ranks``: it wants several processes, started by torchrun. ``rows``: the names of a scale's rows, from which
    ``--only`` chooses.
    """

    measure: Callable[[Run], None]
    show: Callable[[Report], Iterator[Shown]]
    scales: Mapping[str, Any]
    operations: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    backends: bool = False
    needs: tuple[str, ...] = ()
    ranks: bool = False
    rows: Callable[[Any], Iterable[str]] | None = None


def find_device(name: str | None) -> torch.device:
    """The named device, or a GPU where there is one.

    Raises:
        OptionError: a GPU is asked for and PyTorch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device", "PyTorch sees no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def run(
    case: Case,
    name: str,
    device: torch.device,
    *,
    known_peers: Mapping[str, Sequence[Peer]],
    quick: bool = False,
    peers: str | None = None,
    backend: str | None = None,
    only: str | None = None,
    out: Path,
    command: Sequence[str] | None = None,
) -> list[Record]:
    """Measure, write ``out/name-device.json`` as it goes, show it; the records of our own failures.

    ``peers``: names with commas; each stands for the implementations that ``known_peers`` has under it. ``only``: a
    regular expression that is found in the names of the rows to measure.

    Raises:
        OptionError: the case cannot be run with these options; nothing has been written then.
    """
    missing = [package for package in case.needs if find_spec(package) is None]
    if missing:
        raise OptionError("case", f"{name} needs {', '.join(missing)}, which is not installed")
    if case.ranks and "RANK" not in os.environ:
        raise OptionError("case", f"{name} wants several processes: torchrun --nproc-per-node 2 -m benchmarks {name}")
    if backend is not None and not case.backends:
        raise OptionError("--backend", f"{name} has no such choice")
    try:
        backends.choose(backend, device)
    except ValueError as error:
        raise OptionError("--backend", str(error)) from None
    scale = f"{device.type} quick" if quick else device.type
    if scale not in case.scales:
        raise OptionError("--quick" if quick else "--device", f"{name} has no such choice")
    chosen = _choose(case, name, peers, known_peers, device)
    rows = None if only is None else _rows(case, name, only, case.scales[scale])
    report = Report(out / f"{name}-{slug(device)}.json", environment(device, chosen, command))
    at_work = Run(report, device, case.scales[scale], chosen, backend, only=rows)
    if not first_process():
        at_work.say = len
    case.measure(at_work)
    if not first_process():
        return []
    show(case.show(report), report.path.with_suffix(".png"))
    print(f"results  {report.path}")
    failures = [r for r in report.records if "error" in r and is_ours(r["implementation"])]
    for failure in failures:
        print(f"our own call failed: {failure['error']} ({failure})")
    return failures


def show(shown: Iterable[Shown], path: Path) -> None:
    """Print tables and sentences; draw the figure to ``path`` where matplotlib is installed, and say so if not."""
    for x in shown:
        if not isinstance(x, Figure):
            print(f"\n{x}\n" if isinstance(x, Table) else x)
        elif find_spec("matplotlib") is None:
            print("figure   not drawn: matplotlib is not installed")
        else:
            x.save(path)
            print(f"figure   {path}")


def _rows(case: Case, name: str, only: str, scale: Any) -> list[str]:
    if case.rows is None:
        raise OptionError("--only", f"{name} has no such choice")
    names = list(case.rows(scale))
    try:
        found = [row for row in names if re.search(only, row)]
    except re.error as error:
        raise OptionError("--only", f"{only!r} is no regular expression: {error}") from None
    if not found:
        raise OptionError("--only", f"{only!r} is in none of the rows: {'; '.join(names)}")
    return found


def _choose(
    case: Case, name: str, peers: str | None, known: Mapping[str, Sequence[Peer]], device: torch.device
) -> list[Peer]:
    able = {
        key: [p for p in group if device.type in p.devices]
        for key, group in known.items()
        if any(operation in p.operations for p in group for operation in case.operations)
    }
    wanted = list(case.peers) if peers is None else [x.strip() for x in peers.split(",") if x.strip()]
    for key in wanted:
        if key not in able:
            among = f"is not among {', '.join(able)}" if able else f"cannot be compared with: {name} has no peers"
            raise OptionError("--peers", f"{key!r} {among}")
    return [p for key in wanted for p in able[key]]
