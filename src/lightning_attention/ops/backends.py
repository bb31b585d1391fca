"""Which backend a call gets. Nothing falls back: a backend that cannot serve the call is an error."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

BACKENDS = ("triton", "tiled", "reference")
_HAS_TRITON = find_spec("triton") is not None


def choose(backend: str | None, device: torch.device) -> str:
    """The backend's name, by device where none is named.

    Raises:
        ValueError: the name is unknown, or the device or this installation lacks the backend.
    """
    if backend is None:
        return "triton" if device.type == "cuda" else "tiled"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(map(repr, BACKENDS))} or None")
    if backend == "triton":
        if not _HAS_TRITON:
            raise ValueError("backend is 'triton', but Triton is not installed")
        if device.type != "cuda":
            raise ValueError(f"backend is 'triton', but q is on {device}; it needs a CUDA or ROCm device")
    return backend


@cache
def module(backend: str, operation: str) -> ModuleType:
    return import_module(f"lightning_attention.kernels.{backend}.{operation}")
