"""Cases and peers, by the names of their files: to add one is to add a file."""

from importlib import import_module
from pkgutil import iter_modules

import benchmarks.cases
import benchmarks.peers
from lightning_attention.bench.case import Case
from lightning_attention.bench.peers import Peer


def case_names() -> list[str]:
    """The names of all cases."""
    return _names(benchmarks.cases.__path__)


def case(name: str) -> Case:
    """The case of that name; a file of ``benchmarks/cases`` has it as ``CASE``."""
    found: Case = import_module(f"benchmarks.cases.{name}").CASE
    return found


def peers() -> dict[str, tuple[Peer, ...]]:
    """By the name of each file of ``benchmarks/peers``, the implementations that it has in ``PEERS``."""
    return {name: import_module(f"benchmarks.peers.{name}").PEERS for name in _names(benchmarks.peers.__path__)}


def _names(path: list[str]) -> list[str]:
    return sorted(module.name for module in iter_modules(path) if not module.name.startswith("_"))
