"""Modules of packages that no index has: they come from the user's own checkout."""

from importlib import import_module
from types import ModuleType


def checkout(module: str, repository: str) -> ModuleType:
    """The module, which a checkout of the repository has.

    Raises:
        ModuleNotFoundError: it, or a package that it needs, is not there; the message says how to get it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        name, package = error.name, module.partition(".")[0]
        if name is not None and name.partition(".")[0] != package:
            raise ModuleNotFoundError(f"{package} needs {name}, which is not installed (docs/benchmarks.md)") from None
        raise ModuleNotFoundError(f"{module} is not there; put a checkout of {repository} on PYTHONPATH") from None
