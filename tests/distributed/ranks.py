"""Cases run on gloo processes, each on as many of them as it has slices."""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Errors = dict[str, float]


def run_cases(
    rank: int, ranks: int, cases: Sequence[Any], folder: str, run_case: Callable[..., Errors]
) -> list[dist.ProcessGroup]:
    """In one of the processes: join the others and run the cases; the groups of the first 1, 2, ... ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    groups = [dist.new_group(list(range(n + 1))) for n in range(ranks)]
    results = []
    for seed, case in enumerate(cases):
        if rank < len(case.lengths):
            results.append(run_case(case, seed, rank, groups[len(case.lengths) - 1]))
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    return groups


def spawn(work: Callable[..., None], cases: Sequence[Any], folder: Path) -> list[tuple[Any, Errors]]:
    """``work(rank, ranks, cases, folder)``, which calls ``run_cases``, in each process; the cases and their errors."""
    ranks = max(len(case.lengths) for case in cases)
    torch.multiprocessing.spawn(work, (ranks, cases, str(folder)), nprocs=ranks)
    return list(zip(cases, json.loads((folder / "results.json").read_text()), strict=True))
