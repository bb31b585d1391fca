"""What the integrations into serving engines share: slopes, and functions in the place of an engine's own."""

import sys
from collections.abc import Callable, Mapping
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Functions = Mapping[str, Callable[..., Any]]

_log_decays = WeakTensorKeyDictionary()
_originals: dict[tuple[str, str], Callable[..., Any]] = {}  # by module and name


def log_decay_of(slopes: Tensor) -> Tensor:
    """log_decay [H], the negative of an engine's slopes of any shape.

    It is made once for each tensor, for a layer's slopes do not change. While a CUDA graph is captured it is made for
    the graph alone: outside of it nobody may read what the graph has yet to compute.
    """
    found: Tensor | None = _log_decays.get(slopes)
    if found is None:
        found = -slopes.detach().flatten().to(torch.float32)
        if not (slopes.is_cuda and torch.cuda.is_current_stream_capturing()):
            _log_decays[slopes] = found
    return found


def put_in_place(*ours: tuple[ModuleType, Functions]) -> None:
    """Put functions in the place of those of the same names in a module, and wherever these were imported to.

    All or, where one is refused, none.

    Raises:
        ValueError: a function is not there, or takes other parameters than ours.
    """
    wanted = []
    for module, functions in ours:
        for name, function in functions.items():
            original = vars(module).get(name)
            if original is function:
                continue
            if not callable(original):
                raise ValueError(f"{module.__name__} has no {name}; this version of the engine is not known")
            if _parameters(original) != _parameters(function):
                raise ValueError(
                    f"{module.__name__}.{name} takes {signature(original)}; what is known takes {signature(function)}"
                )
            wanted.append((module, name, original, function))
    for module, name, original, function in wanted:
        for holder in [module, *_holding(module, name, original)]:
            _originals[holder.__name__, name] = original
            setattr(holder, name, function)


def put_back(*ours: tuple[ModuleType, Functions]) -> None:
    """Undo ``put_in_place``, also where ours were imported to since. What is not changed stays as it is.

    Raises:
        ValueError: another function has since been put in the place of ours.
    """
    changed = [
        (m, name, f) for m, functions in ours for name, f in functions.items() if (m.__name__, name) in _originals
    ]
    for module, name, function in changed:
        if vars(module).get(name) is not function:
            raise ValueError(f"{module.__name__}.{name} has been replaced since; put that back first")
    for module, name, function in changed:
        original = _originals.get((module.__name__, name))
        for holder in [] if original is None else [*_holding(module, name, function), module]:
            setattr(holder, name, _originals.pop((holder.__name__, name), original))


def _holding(module: ModuleType, name: str, function: object) -> list[ModuleType]:
    """Other modules of its package that have the function under its name."""
    root = module.__name__.partition(".")[0]
    loaded = [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == root and isinstance(m, ModuleType)]
    return [m for m in loaded if m is not module and vars(m).get(name) is function]


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(x.name, x.kind, x.default) for x in signature(function).parameters.values()]
