"""Which backend a call gets. Nothing falls back: a backend that cannot serve the call is an error."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from lightning_attention.kernels.backend import Backend
from lightning_attention.kernels.reference.backend import BACKEND as REFERENCE
from lightning_attention.kernels.tiled.backend import BACKEND as TILED

HAS_TRITON = find_spec("triton") is not None


def _triton() -> Backend:
    if not HAS_TRITON:
        raise ValueError("backend is 'triton', but Triton is not installed")
    from lightning_attention.kernels.triton.backend import BACKEND  # not without need: it takes half a second

    return BACKEND


#: How to get at each backend by its name, in the order in which they are listed to users.
BACKENDS: dict[str, Callable[[], Backend]] = {
    "triton": _triton,
    "tiled": lambda: TILED,
    "reference": lambda: REFERENCE,
}


def register(backend: Backend) -> None:
    """Make a backend one that calls can name, in place of any other of its name."""
    BACKENDS[backend.name] = lambda: backend
    get.cache_clear()


def choose(backend: str | None, device: torch.device) -> str:
    """The backend's name, by device where none is named.

    Raises:
        ValueError: the name is unknown, or the device or this installation lacks the backend.
    """
    if backend is None:
        return "triton" if device.type == "cuda" else "tiled"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(map(repr, BACKENDS))} or None")
    missing = BACKENDS[backend]().missing(device)
    if missing is not None:
        raise ValueError(f"backend is {backend!r}, but q is on {device}; {missing}")
    return backend


@cache
def get(name: str) -> Backend:
    """The backend of this name; ``choose`` says whether a device has it."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[name]()
