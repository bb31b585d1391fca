"""Capturing CUDA graphs."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for every capture: cuBLAS keeps 32 MB for each stream that it has seen, for good."""
    return torch.cuda.Stream(device)


def capture(call: Callable[[], Result], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of the call, made after a run that warms it up, and what the call returned while it was captured.

    A graph knows the addresses of the tensors that the call reads and writes, and does not own them. ``pool``: another
    graph's memory, for graphs of which one runs at a time.
    """
    side = _stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side):
        result = call()
    return graph, result
