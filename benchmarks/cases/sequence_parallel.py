"""One sequence over many GPUs: a rank alone, and in the group. Started by torchrun.

``torchrun --nproc-per-node 2 -m benchmarks sequence_parallel`` makes the table of docs/distributed.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness.errors import within
from benchmarks.harness.ranks import joined, largest, slowest_ms
from lightning_attention import decay
from lightning_attention.bench.attention import BOTH, FORWARD, Problem, Shape
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import ours
from lightning_attention.bench.render import pivot
from lightning_attention.bench.report import Record, Report
from lightning_attention.bench.timing import Timing
from lightning_attention.check import relative_error

SUITE = "sequence parallelism"
#: With slow ones every token matters to the states, and they cost a pass over k and v.
DECAYS: dict[str, Callable[[int], torch.Tensor | None]] = {
    "ALiBi": decay.alibi,
    "slow": lambda H: 1e-5 * decay.alibi(H),
    "none": lambda H: None,  # noqa: ARG005
}


@dataclass(frozen=True)
class Scale:
    """Tokens of each rank. ``budget``: the relative error allowed against the whole sequence on one device."""

    tokens: tuple[int, ...]
    H: int
    D: int
    dtype: torch.dtype
    repeats: int
    budget: float


SCALES = {
    "cuda": Scale((8192, 65_536, 262_144), 32, 128, torch.bfloat16, repeats=30, budget=5e-3),
    "cpu": Scale((256, 1024), 2, 32, torch.float32, repeats=5, budget=1e-5),
}


def measure(run: Run) -> None:
    """Every number of tokens and kind of decays, forward and forward+backward, alone and in the group of all ranks.

    A time is the slowest rank's, by the clock, from a barrier on. At the smallest number of tokens outputs and
    gradients are compared with those of the whole sequence on one device.
    """
    with joined(run.device):
        for T in run.scale.tokens:
            for name in DECAYS:
                _measure(run, T, name)


def _measure(run: Run, T: int, decays: str) -> None:
    scale, device, ranks, rank = run.scale, run.device, dist.get_world_size(), dist.get_rank()
    shape = Shape(1, ranks * T, scale.H, scale.D)
    whole = Problem(shape, scale.dtype, device, log_decay=DECAYS[decays])  # the same on every rank
    own = slice(rank * T, (rank + 1) * T)
    part, alone, together = whole.changed(lambda x: x[:, own].clone()), ours(), ours(group=dist.group.WORLD)
    judged: dict[str, Any] = {}
    if min(scale.tokens) == T:
        pairs = zip(part.results(together), whole.results(alone), strict=True)
        judged = within(scale.budget, largest(max(relative_error(a, b[:, own]) for a, b in pairs), device))
    del whole
    for pass_ in (FORWARD, BOTH):
        for peer in (alone, together):
            record = part.sizes | {"T": T, "decay": decays, "ranks": 1 if peer is alone else ranks, "pass": pass_}
            record |= asdict(Timing.of(_samples(part.call(peer, pass_), scale.repeats, device)))
            run.add(SUITE, peer, **record, **(judged if peer is together and pass_ == BOTH else {}))


def _samples(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    for _ in range(3):  # compiled, allocated
        call()
    return [slowest_ms(call, device) for _ in range(repeats)]


def show(report: Report) -> Iterator[Shown]:
    """A row for each number of tokens and kind of decays, alone and in the group."""
    records = [{"decay": "ALiBi"} | r for r in report.find(SUITE)]  # older ones have no other

    def cells(r: Record) -> dict[str, str]:
        return {f"{r['pass']}\n{r['ranks']} rank{'s' * (r['ranks'] > 1)}": f"{r['ms']:.3g}"}

    yield from pivot(
        "Sequence parallelism (ms of the slowest rank)", {"T a rank": "T", "decays": "decay"}, records, cells, words=1
    )
    errors = [r["relative_error"] for r in records if "relative_error" in r]
    if errors:
        yield f"outputs and gradients against the whole sequence on one device: {max(errors):.1e}"


CASE = Case(measure, show, SCALES, ranks=True)
