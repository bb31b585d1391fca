"""Processes that torchrun starts: their group, and the time of the slowest."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lightning_attention.bench.timing import wall_ms


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the others: by NCCL, a GPU for each process, or by gloo on CPUs. Yields this process's device."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def largest(value: float, device: torch.device) -> float:
    """The largest of all processes' values."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def slowest_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds on the clock that the slowest process takes for a call, from a barrier on."""
    dist.barrier()
    return largest(wall_ms(call, device), device)
