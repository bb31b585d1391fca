"""One thread for each share of the work, in place of all threads for each operation.

PyTorch runs every operation on all threads and waits for the slowest at its end. A piece of attention is twenty small
operations; where other processes run, one of them is waited for at the end of each, spinning by default. Shares that
do not depend on each other are waited for once.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch


def available() -> int:
    """How many shares can be worked on at once."""
    # A thread of its own can be told to run operations alone where they are shared out by OpenMP.
    return torch.get_num_threads() if torch.backends.openmp.is_available() else 1


def _alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first look would else set the thread to what the caller's is, later


@cache
def _executor(count: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked process has lost its threads
    started = threading.Barrier(count + 1)
    executor = ThreadPoolExecutor(count, "lightning_attention", initializer=_alone)
    try:
        for _ in range(count):
            executor.submit(started.wait)
        started.wait()
    except BaseException:
        started.abort()  # Ctrl-C, or no thread for all of them: those that wait would do so at the exit still
        executor.shutdown(wait=False)
        raise
    finally:
        # One was for those threads alone, but new ones of the caller's would start with it too.
        torch.set_num_threads(count)
    return executor


def run(tasks: Sequence[Callable[[torch.Tensor], None]], spaces: Sequence[torch.Tensor]) -> None:
    """Every task, each with one of the spaces to itself; with more than one space, in as many threads."""
    left = deque(tasks)
    inference = torch.is_inference_mode_enabled()

    def work(space: torch.Tensor) -> None:
        while left:
            try:
                task = left.popleft()
            except IndexError:
                return
            task(space)

    def work_elsewhere(space: torch.Tensor) -> None:
        # The caller is below autograd, and may be in inference mode; another thread knows nothing of it.
        with torch.inference_mode() if inference else torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
            work(space)

    if len(spaces) == 1:
        work(spaces[0])
        return
    futures: list[Future[None]] = []
    try:
        try:
            executor = _executor(available(), os.getpid())
            for space in spaces:
                futures.append(executor.submit(work_elsewhere, space))
        except RuntimeError:
            # No more threads: there is a limit, or the main thread is done, and others and atexit's functions go on.
            work(spaces[len(futures)])
        for future in futures:
            future.result()
    finally:
        left.clear()  # one has failed: the others need not go on
