"""CUDA graphs, the time on the host, and the copy rate that a memory-bound kernel is held against."""

import statistics
import time
from collections.abc import Callable

import torch

from lightning_attention.bench.timing import Call, synchronize, time_calls, wall_ms
from lightning_attention.serving.cuda_graphs import capture

COPY_BYTES = 2 << 30


def captured(call: Call, device: torch.device) -> Call:
    """On a GPU the replay of a CUDA graph of the call, made after a run that warms it up; elsewhere the call itself.

    What is returned keeps the call too: were it dropped, with a pool of states that nobody else has, replays would read
    and write freed memory.
    """
    if device.type != "cuda":
        return call
    graph, _ = capture(call, device)
    return lambda _kept=call: graph.replay()  # type: ignore[misc]


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a device-to-device copy moves, read and written ones counted: the memory's real ceiling."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES >> 4
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)  # noqa: E731
    wall_ms(copy, device)
    return 2 * size / (time_calls({"copy": copy}, device, seconds=0.3)["copy"].ms * 1e-3)


def host_us(call: Call, device: torch.device, *, repeats: int = 400) -> float:
    """Microseconds that the calling thread spends in a call, device work not waited for (median).

    Use it with a shape so small that the device is done before the next call is made. The queue is drained every
    20 calls, so that a full one never makes the host wait.
    """
    samples = []
    for i in range(repeats):
        if i % 20 == 0:
            synchronize(device)
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(samples)


def busy_us(call: Call, device: torch.device, *, repeats: int = 400) -> float:
    """Microseconds of the processor that a call takes, all threads of the process together.

    The least of means over 20 calls: what other processes do to the machine is hardly in it, and no waiting of a thread
    for another.
    """
    return min(_means(call, device, repeats, time.process_time_ns, waited_for=False))


def in_flight_us(call: Call, device: torch.device, *, repeats: int = 400) -> float:
    """Microseconds a call, of 20 made one after another and then waited for (median).

    It is the host's time or the device's, whichever is longer.
    """
    return statistics.median(_means(call, device, repeats, time.perf_counter_ns, waited_for=True))


def _means(
    call: Call, device: torch.device, repeats: int, clock: Callable[[], int], *, waited_for: bool
) -> list[float]:
    """Microseconds a call by a clock, of every 20 calls; ``waited_for``: until the device is done with them."""
    samples = []
    for _ in range(-(-repeats // 20)):
        synchronize(device)
        start = clock()
        for _ in range(20):
            call()
        if waited_for:
            synchronize(device)
        samples.append((clock() - start) / 20e3)
    return samples
