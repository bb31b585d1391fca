"""Timers for a CPU and a GPU, and peak memory."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

Call = Callable[[], object]

#: Written between repetitions so that none finds its inputs in the L2 cache (60 MB on an H200, 126 MB on a B200).
#: It also keeps the GPU busy for 0.25 ms, in which the host gets ahead: a launch is then no part of what is timed.
FLUSH_BYTES = 1 << 30


@dataclass(frozen=True)
class Timing:
    """Median, fastest and slowest of ``repeats`` calls, in milliseconds."""

    ms: float
    min_ms: float
    max_ms: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_ms(call: Call, device: torch.device) -> float:
    """Milliseconds of wall time of one call and all the device work it started."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def time_calls(
    calls: dict[str, Call], device: torch.device, *, seconds: float, max_repeats: int = 100, flushes: int = 1
) -> dict[str, Timing]:
    """Times every call, taking turns, for about ``seconds`` each and at least three times.

    The turns spread a slow moment of the machine over all of them, so the ratios hold where the times do not. The
    calls are expected to have run once before (compiled, allocated). On a GPU they are timed by events, with the L2
    flushed before each: a flush takes 0.25 ms, and several hide a call for which the host needs longer. On a CPU
    they are timed by the clock.
    """
    estimates = {name: wall_ms(call, device) for name, call in calls.items()}
    repeats = {name: min(max(3, int(seconds * 1e3 / ms)), max_repeats) for name, ms in estimates.items()}
    samples = _samples(calls, repeats, device, flushes)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _turns(repeats: dict[str, int]) -> list[str]:
    """The order of the calls, each as often as ``repeats`` says and evenly spread."""
    rounds = max(repeats.values(), default=0)
    return [name for i in range(rounds) for name, n in repeats.items() if (i * n) % rounds < n]


def _samples(
    calls: dict[str, Call], repeats: dict[str, int], device: torch.device, flushes: int
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    events = []
    for name in _turns(repeats):
        if device.type != "cuda":
            samples[name].append(wall_ms(calls[name], device))
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(flushes):
            flush_l2(device)
        start.record()
        calls[name]()
        end.record()
        events.append((name, start, end))
    synchronize(device)
    for name, start, end in events:
        samples[name].append(start.elapsed_time(end))
    return samples


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def flush_l2(device: torch.device) -> None:
    """Replaces what the GPU's L2 cache holds."""
    _flush_buffer(device).zero_()


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that the call has allocated through PyTorch at once, over what was allocated before it.

    On a GPU this is the caching allocator's own high-water mark. On a CPU it is the running sum of the allocations
    and releases that torch.profiler records: exact and repeatable to the byte, where the resident set of a process
    depends on what the C library keeps of earlier calls and on pages that were never touched. Neither counts what a
    library allocates by itself.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints two lines to stderr for every profile
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
