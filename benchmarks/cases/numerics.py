"""Errors against float64 by type, length and decay, beside the recurrence computed naively in the inputs' type."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_attention.bench.attention import result_or_error
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import ATTENTION, Peer, ours
from lightning_attention.bench.render import pivot
from lightning_attention.bench.report import Record, Report
from lightning_attention.check import relative_error
from lightning_attention.ops.attention import lightning_attention


class Scale(NamedTuple):
    """Lengths, the decays, one for each head, and D."""

    lengths: tuple[int, ...]
    decays: tuple[float, ...]
    D: int
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


DECAYS = (-1e-5, -1e-4, -1e-3, -1e-2, -0.1, -1.0, -8.0)
SCALES = {
    "cpu": Scale((256, 1024, 4096, 16_384, 65_536), DECAYS, 64),
    "cpu quick": Scale((256, 1024), DECAYS[1::2], 32),
    "cuda": Scale((256, 1024, 4096, 16_384, 65_536), DECAYS, 128),
}


def naive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """The definition token by token, with the state, the decay and every product in the inputs' type."""
    B, T, H, D = q.shape
    state = q.new_zeros(B, H, D, v.shape[-1])
    decay = q.new_ones(1) if log_decay is None else log_decay.exp().to(q.dtype).view(H, 1, 1)
    out = torch.empty_like(v)
    for t in range(T):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None]
        out[:, t] = (q[:, t, :, None] @ state).squeeze(2)
    return out


NAIVE = Peer("naive", "the recurrence in the inputs' type", "torch", {ATTENTION: lambda: naive})


def measure(run: Run) -> None:
    """The output's relative Frobenius error of each head, each of which has a decay of its own."""
    scale, own = run.scale, ours(run.backend)
    log_decay = torch.tensor(scale.decays, device=run.device)
    for T in scale.lengths:
        generator = torch.Generator(run.device).manual_seed(T)
        shape = (3, 1, T, len(scale.decays), scale.D)
        drawn = torch.randn(shape, dtype=torch.float64, device=run.device, generator=generator)
        for dtype in scale.dtypes:
            q, k, v = drawn.to(dtype)
            exact = lightning_attention(q.double(), k.double(), v.double(), log_decay, backend="tiled").output
            for peer in (own, NAIVE, *(peer for peer in run.peers if not peer.softmax)):
                found = result_or_error(lambda: {"out": _output(peer, q, k, v, log_decay)})  # noqa: B023
                for h, decay in enumerate(scale.decays):
                    result = {x: y for x, y in found.items() if x != "out"}
                    if "out" in found:
                        result["relative_error"] = relative_error(found["out"][:, :, h], exact[:, :, h])
                    run.add("numerics", peer, T=T, D=scale.D, dtype=dtype, log_decay=decay, **result)


def _output(peer: Peer, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    q, k, v = map(peer.ordered, (q, k, v))
    return peer.ordered(peer.attention()(q, k, v, log_decay))  # the same two dimensions change places again


def show(report: Report) -> Iterator[Shown]:
    """A row for each type, length and decay."""

    def decay(r: Record) -> str:
        return f"{r['log_decay']:g}"

    def cells(r: Record) -> dict[str, str]:
        return {r["label"]: f"{float(r['relative_error']):.1e}" if "relative_error" in r else "failed"}

    keys: dict[str, str | Callable[[Record], str]] = {"type": "dtype", "T": "T", "log_decay": decay}
    yield from pivot("relative error of the output", keys, report.find("numerics"), cells)


CASE = Case(measure, show, SCALES, operations=(ATTENTION,), backends=True)
