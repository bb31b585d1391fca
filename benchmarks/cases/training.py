"""Training: tokens per second of a step against the length of the sequences, beside a Llama of as many weights."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.render import Table, length
from lightning_attention.bench.report import Report
from lightning_attention.bench.timing import wall_ms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUITE = "training"
_K = 1024


@dataclass(frozen=True)
class Scale:
    """What to measure: of each size ``lengths``, by model, and ``tokens`` a step, or one sequence where that is longer.

    ``checkpointed``: from this length on, blocks are computed anew in the backward pass. ``overrides``: fields of the
    configurations, instead of the sizes'. ``seconds``: where fewer steps take so long, fewer are timed.
    """

    lengths: dict[str, dict[str, tuple[int, ...]]]
    tokens: dict[str, int]
    checkpointed: dict[str, int]
    steps: int
    seconds: float
    dtype: torch.dtype
    compile: bool
    overrides: dict[str, int]


_PAPERS = (_K, 2 * _K, 4 * _K, 8 * _K, 16 * _K, 32 * _K, 64 * _K, 80 * _K, 92 * _K)
#: Longer ones, for TransNormerLLM: the last is about what fits, with blocks computed anew.
_LONG = {"385M": (256 * _K, _K * _K), "1B": (256 * _K, 512 * _K), "3B": (256 * _K,)}
SCALES = {
    "cuda": Scale(
        {size: {"transnormer": _PAPERS + long, "llama": _PAPERS} for size, long in _LONG.items()},
        # The activations of 32,768 tokens in 3B have no room beside its weights.
        {"385M": 32 * _K, "1B": 32 * _K, "3B": 16 * _K}, {"385M": 128 * _K, "1B": 128 * _K, "3B": 32 * _K},
        8, 5.0, torch.bfloat16, True, {},
    ),
    "cpu": Scale({"75M": {"transnormer": (16, 32), "llama": (16,)}}, {"75M": 32}, {"75M": 32}, 1, 0.0, torch.float32,
                 False, {"vocab_size": 512}),
}  # fmt: skip


def measure(run: Run) -> None:
    """Steps of AdamW through both models, at every length of the scale, as records of the suite ``training``.

    Blocks are compiled one by one, as ``lightning-attention train --compile`` does; both models have the loss without
    logits. Weights and the optimizer's state are in the scale's dtype. A step reads ``tokens``, or one sequence where
    that is longer. For each: ``ms`` (median of some steps by the clock), ``tokens_per_second``, ``mfu`` by the formula
    of docs/training.md, ``peak_bytes``, and the ``loss`` of the first step of random tokens, which is near log V.
    """
    scale, device = run.scale, run.device
    for size, models in scale.lengths.items():
        for model, lengths in models.items():
            wanted = [T for T in lengths if run.only is None or _name(size, model, T) in run.only]
            for checkpointed in (False, True):
                some = [T for T in wanted if (scale.checkpointed[size] <= T) == checkpointed]
                if some:
                    _measure(run, size, model, some, checkpointed)
                torch.compiler.reset()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _measure(run: Run, size: str, model: str, lengths: list[int], checkpointed: bool) -> None:
    from lightning_attention.distributed.mesh import Mesh
    from lightning_attention.distributed.parallelize import parallelize
    from lightning_attention.models.presets import preset
    from lightning_attention.training.flops import flops_per_token, peak_flops

    scale, device = run.scale, run.device
    config = preset(size, model, **scale.overrides)
    network = build(config, model, scale.dtype, device)
    parallelize(network, Mesh(), activation_checkpointing="block" if checkpointed else "none", compile=scale.compile)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    for T in lengths:
        B = max(1, scale.tokens[size] // T)
        about: dict[str, Any] = {"model": model, "size": size, "T": T, "B": B, "checkpointed": checkpointed}
        about |= {"parameters": sum(p.numel() for p in network.parameters()), "dtype": scale.dtype}
        try:
            ms, loss, peak_bytes = _time(_step(network, optimizer, B, T, device), scale, device)
        except torch.OutOfMemoryError as error:
            run.add(SUITE, **about, skipped=str(error).partition("\n")[0])
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        speed = 1000 * B * T / ms
        found: dict[str, Any] = {"tokens_per_second": speed, "loss": loss}
        if peak is not None:
            found |= {"mfu": speed * flops_per_token(config, T) / peak, "peak_bytes": peak_bytes}
        run.add(SUITE, **about, ms=ms, **found)


def build(config: Any, model: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with fresh weights of a dtype, the same at every call."""
    from lightning_attention.models.presets import classes

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network = classes(model)[1](config)
    finally:
        torch.set_default_dtype(before)
    return network.train()


def _step(
    network: PreTrainedModel, optimizer: torch.optim.Optimizer, B: int, T: int, device: torch.device
) -> Callable[[], Tensor]:
    from lightning_attention.nn import linear_cross_entropy

    ids = torch.randint(3, network.config.vocab_size, (B, T), device=device)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)

    def step() -> Tensor:
        hidden = network.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = linear_cross_entropy(hidden, network.lm_head.weight, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _time(step: Callable[[], Tensor], scale: Scale, device: torch.device) -> tuple[float, float, int]:
    """Milliseconds of a step, the loss of the first one, and the peak of memory of the later ones."""
    loss = float(step())
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples: list[float] = []
    while len(samples) < scale.steps and (len(samples) < 3 or sum(samples) < 1000 * scale.seconds):
        samples.append(wall_ms(step, device))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return statistics.median(samples), loss, peak


def _name(size: str, model: str, T: int) -> str:
    return f"{size} {model} {T}"


def rows(scale: Scale) -> Iterator[str]:
    """Each size's models at their lengths."""
    for size, models in scale.lengths.items():
        for model, lengths in models.items():
            yield from (_name(size, model, T) for T in lengths)


def show(report: Report) -> Iterator[Shown]:
    """Tokens per second by length, a row for each model of each size; * where blocks are computed anew."""
    records = report.find(SUITE)
    lengths = sorted({r["T"] for r in records})
    for title, cell in (
        ("Training: tokens per second and GPU (* with activation checkpointing)", _speed),
        ("Model FLOP/s utilisation", lambda r: f"{r['mfu']:.3f}" if "mfu" in r else ""),
        ("Peak memory, GB", lambda r: f"{r['peak_bytes'] / 1e9:.0f}" if "peak_bytes" in r else ""),
    ):
        table = []
        for size, model in dict.fromkeys((r["size"], r["model"]) for r in records):
            found = {r["T"]: cell(r) for r in records if (r["size"], r["model"]) == (size, model)}
            table.append([size, model, *(found.get(T, "") for T in lengths)])
        if any(any(row[2:]) for row in table):
            yield Table(title, ["size", "model", *map(length, lengths)], table, words=2)


def _speed(r: dict[str, Any]) -> str:
    if "skipped" in r:
        return "out of memory"
    return f"{r['tokens_per_second']:,.0f}" + "*" * r["checkpointed"]


CASE = Case(measure, show, SCALES, needs=("transformers",), rows=rows)
