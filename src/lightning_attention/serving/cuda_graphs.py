"""Capturing CUDA graphs."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of every capture: cuBLAS keeps 32 MB for each stream it has seen, and never frees it."""
    return torch.cuda.Stream(device)


def capture(call: Callable[[], Result], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture a call after a run that warms it up. Returns the graph, and what the call returned during capture.

    A graph holds the addresses of the tensors that the call reads and writes, but does not own them. ``pool`` is the
    memory of another graph, to be shared by graphs that never run at the same time.
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
