"""Training on many GPUs: a step of one alone, and of all, with sharded weights or a sequence cut. Started by torchrun.

``torchrun --nproc-per-node 2 -m benchmarks scaling`` makes the table of docs/distributed.md. It also trains one model
on every dp_shard x sp mesh of the processes: the losses must agree.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.cases.training import build
from benchmarks.harness.ranks import joined, slowest_ms
from benchmarks.plan import Job, sequence_traffic
from lightning_attention.bench.case import Case, OptionError, Run, Shown
from lightning_attention.bench.render import Table
from lightning_attention.bench.report import Record, Report, device_name
from lightning_attention.check import relative_error
from lightning_attention.distributed import sequence_parallel
from lightning_attention.distributed.sequence_parallel import gathered

if TYPE_CHECKING:
    from lightning_attention.distributed.mesh import Mesh

SUITE = "scaling"
_K = 1024


@dataclass(frozen=True)
class Row:
    """B sequences of T tokens a GPU, as it is alone. Together each has as many, with ``dp``, its own sequences; with
    ``sp`` they are slices of longer ones. With a mesh, such as ``4x2`` (dp_shard x sp), the T tokens of a sequence are
    cut over sp GPUs, which have sp times B sequences in common; there is no step alone.

    ``compared``: loss and gradients of all that the GPUs read together are compared with those of one GPU, which reads
    it too. ``checkpointed``: blocks are computed anew in the backward pass.
    """

    size: str
    way: str
    B: int
    T: int
    compared: bool = False
    checkpointed: bool = False

    def __str__(self) -> str:
        return f"{self.size} {self.way} {self.B} x {self.T}"


@dataclass(frozen=True)
class Scale:
    """What to measure; ``overrides``: fields of the configurations, instead of the sizes'.

    ``mesh``: the row that is measured with each mesh of the processes, with so many ``mesh_steps``.
    """

    rows: tuple[Row, ...]
    steps: int
    mesh: Row
    mesh_steps: int
    dtype: torch.dtype
    compile: bool
    copied: int  # bytes, to measure rates with
    overrides: dict[str, int]

    def meshes(self, ranks: int) -> list[Row]:
        """A row for each mesh of so many ranks; the first cuts no sequences."""
        return [replace(self.mesh, way=f"{ranks // sp}x{sp}") for sp in range(1, ranks + 1) if ranks % sp == 0]


SCALES = {
    "cuda": Scale(
        (
            Row("385M", "dp", 4, 8 * _K, compared=True),
            Row("1B", "dp", 4, 8 * _K),
            Row("385M", "sp", 1, 512 * _K, compared=True, checkpointed=True),
            Row("385M", "sp", 1, 1216 * _K, checkpointed=True),
            Row("385M", "dp", 1, 8 * _K),
            Row("1B", "dp", 1, 8 * _K),
            Row("385M", "dp", 1, 64 * _K),
            Row("1B", "dp", 1, 64 * _K),
            Row("385M", "sp", 1, 256 * _K, checkpointed=True),
        ),
        6, Row("385M", "mesh", 1, 8 * _K), 50, torch.bfloat16, True, 1 << 29, {},
    ),
    "cpu": Scale(
        (Row("75M", "dp", 2, 16, compared=True), Row("75M", "sp", 2, 16, compared=True, checkpointed=True)),
        1, Row("75M", "mesh", 1, 16), 5, torch.float32, False, 1 << 16,
        {"vocab_size": 512, "decoder_layers": 2, "decoder_embed_dim": 64, "decoder_attention_heads": 2, "glu_dim": 96},
    ),
}  # fmt: skip


def measure(run: Run) -> None:
    """Steps of AdamW of TransNormerLLM, alone and together, as records of the suite ``scaling``.

    Weights and the optimizer's state have the scale's dtype, gradients are reduced in float32, blocks are compiled one
    by one and the loss is computed without logits. For each row ``ms`` (a median; the slowest GPU's, by the clock, from
    a barrier on), ``tokens_per_second`` of each GPU, ``peak_bytes`` of the first, and of the compared ones ``loss`` and
    the relative errors of the gradients. First the rates of a copy and of an all-gather, in bytes per second.

    Last the meshes of all ranks, in steps that read the same tokens on each: see ``_train``.
    """
    with joined(run.device) as own:
        if dist.get_world_size() == 1:
            raise OptionError(
                "case", "scaling wants several processes: torchrun --nproc-per-node 2 -m benchmarks scaling"
            )
        run.add(SUITE, row="rates", **_rates(run.scale.copied, own))
        for row in run.scale.rows:
            if run.only is None or str(row) in run.only:
                _measure(run, row, own)
        for row in run.scale.meshes(dist.get_world_size()):
            if run.only is None or str(row) in run.only:
                _measure_mesh(run, row, own)


def _rates(size: int, device: torch.device) -> dict[str, Any]:
    ranks = dist.get_world_size()
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = _median(lambda: y.copy_(x), 10, device)
    group = dist.new_group()
    gather = _median(lambda: gathered(x, group), 10, device)
    return {
        "ranks": ranks,
        "ms": copy,
        "copied_per_second": 2e3 * size / copy,
        "gathered_per_second": 1e3 * size * (ranks - 1) / gather,
    }


def _measure(run: Run, row: Row, device: torch.device) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(1)
    ids = torch.randint(3, run.scale.overrides.get("vocab_size", 64_000), (ranks, row.B, row.T), device=device)
    # With sp one forward pass reads whole sequences, else each its own.
    whole = ids.transpose(0, 1).reshape(1, row.B, ranks * row.T) if row.way == "sp" else ids
    about = _about(run.scale, row)
    expected: dict[str, Tensor] = {}
    for count in (1, ranks):
        try:
            found = _steps(run, row, ids[rank], whole, count, expected, device)
            found |= {"tokens_per_second": 1000 * row.B * row.T / found["ms"]}
        except torch.OutOfMemoryError as error:
            found = {"skipped": str(error).partition("\n")[0]}
        run.add(SUITE, **about, ranks=count, **found)
        _forget(device)


def _about(scale: Scale, row: Row) -> dict[str, Any]:
    about: dict[str, Any] = {"row": str(row), "size": row.size, "way": row.way, "B": row.B, "T": row.T}
    return about | {"checkpointed": row.checkpointed, "dtype": scale.dtype} | scale.overrides


def _forget(device: torch.device) -> None:
    """Leave the next model the memory of the last one."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _steps(
    run: Run, row: Row, own: Tensor, whole: Tensor, ranks: int, expected: dict[str, Tensor], device: torch.device
) -> dict[str, Any]:
    """Time steps alone or together. Alone it fills ``expected``, with which it compares together."""
    from lightning_attention.distributed.mesh import Mesh

    scale = run.scale
    mesh = Mesh()
    if ranks > 1:
        mesh = Mesh.fit(ranks, sp=ranks if row.way == "sp" else 1).connect(device.type)
    network, optimizer = _model(scale, row, mesh, scale.dtype, device)

    def learn(batches: Tensor) -> Tensor:
        losses = []
        for batch in batches:
            losses.append(network(input_ids=batch, labels=batch, group=mesh.sp_group, use_cache=False).loss)
            (losses[-1] / len(batches)).backward()
        return torch.stack(losses).detach().mean()

    def step() -> Tensor:
        loss = learn(own[None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    found: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters())}
    if row.compared:
        loss = learn(own[None] if ranks > 1 else whole)
        if ranks > 1 and row.way == "dp":
            dist.all_reduce(loss)
            loss /= ranks
        found |= {"loss": float(loss)}
        found |= _compare(network, expected) if ranks > 1 else {}
        if ranks == 1:
            gradients = {name: p.grad for name, p in network.named_parameters()}
            expected.update({name: grad.clone() for name, grad in gradients.items() if grad is not None})
        optimizer.zero_grad(set_to_none=True)
        torch.compiler.reset()  # what is timed is code for its own lengths
    step()
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ms = _median(step, scale.steps, device)
    peak = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {"ms": ms} | found | peak


def _model(
    scale: Scale, row: Row, mesh: Mesh, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh model with weights of one dtype, sharded over the mesh, and its optimizer."""
    from lightning_attention.distributed.parallelize import parallelize
    from lightning_attention.models.presets import preset

    # LRPE's frequencies too: FSDP gathers all of a block in one type.
    network = build(preset(row.size, "transnormer", **scale.overrides), "transnormer", dtype, device).to(dtype)
    kept = "block" if row.checkpointed else "none"
    bf16 = scale.dtype == torch.bfloat16
    parallelize(network, mesh, activation_checkpointing=kept, compile=scale.compile, bf16=bf16)
    return network, torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)


def _measure_mesh(run: Run, row: Row, device: torch.device) -> None:
    ranks = dist.get_world_size()
    found = _train(run.scale, row, device)
    for uncut in run.report.find(SUITE, row=str(run.scale.meshes(ranks)[0])):  # none where --only left it out
        pairs = zip(found["losses"], uncut["losses"], strict=True)
        found["largest_loss_difference"] = max(abs(loss - expected) / expected for loss, expected in pairs)
    run.add(SUITE, **_about(run.scale, row), ranks=ranks, **found)
    _forget(device)


def _train(scale: Scale, row: Row, device: torch.device) -> dict[str, Any]:
    """Train on a mesh. A step reads the same sequences whatever the mesh, so the losses must be the same.

    Weights and the optimizer's state are in float32, as ``lightning-attention train`` has them: steps of AdamW are so
    small that rounding to bfloat16 would hide differences. ``losses`` are those of all sequences, ``peak_bytes`` is the
    largest of all ranks. ``state_bytes`` is what the first rank gives to the all-gathers of states in a step: counted,
    counted with sequences half as long, and by the formula of docs/distributed.md.
    """
    from lightning_attention.distributed.mesh import Mesh
    from lightning_attention.models.presets import preset
    from lightning_attention.training.flops import Shape

    ranks = dist.get_world_size()
    mesh = Mesh.fit(ranks, sp=int(row.way.partition("x")[2])).connect(device.type)
    network, optimizer = _model(scale, row, mesh, torch.float32, device)
    torch.manual_seed(1)
    tokens = scale.overrides.get("vocab_size", 64_000) - 3
    # Some tokens are more frequent than others: there is something to learn.
    ids = 3 + (tokens * torch.rand(scale.mesh_steps, ranks * row.B, row.T, device=device) ** 4).long()

    def learn(batch: Tensor) -> Tensor:
        own = batch.tensor_split(mesh.dp_size)[mesh.dp_rank].tensor_split(mesh.sp, 1)[mesh.sp_rank]
        loss = network(input_ids=own, labels=own, group=mesh.sp_group, use_cache=False).loss
        loss.backward()
        return loss.detach()

    with torch.compiler.set_stance("force_eager"), _states_sent() as of_half:
        learn(ids[0, :, : row.T // 2])
    optimizer.zero_grad(set_to_none=True)
    losses: list[Tensor] = []

    def step(batch: Tensor) -> None:
        losses.append(learn(batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    samples = []
    for i, batch in enumerate(ids):
        if i == 2 and device.type == "cuda":  # compiled, allocated
            torch.cuda.reset_peak_memory_stats(device)
        with _states_sent() as sent:
            samples.append(slowest_ms(partial(step, batch), device))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    of_ranks: list[Any] = [None] * ranks
    dist.all_gather_object(of_ranks, (device_name(device), peak))
    curve = torch.stack(losses)
    dist.all_reduce(curve)
    ms = statistics.median(samples[2:])
    job = Job(1, mesh.dp_shard, mesh.sp, row.T, row.B * row.T)
    received = sequence_traffic(Shape.of(preset(row.size, "transnormer", **scale.overrides)), job, 0)["states"]
    found: dict[str, Any] = {"ms": ms, "tokens_per_second": 1000 * row.B * row.T / ms}
    found |= {"losses": (curve / ranks).tolist(), "devices": [name for name, _ in of_ranks], "state_bytes": sum(sent)}
    found |= {"state_bytes_at_half": sum(of_half), "state_bytes_by_formula": round(received / max(mesh.sp - 1, 1))}
    return found | ({} if peak is None else {"peak_bytes": max(peak for _, peak in of_ranks)})


@contextmanager
def _states_sent() -> Iterator[list[int]]:
    """The bytes of each message that this rank gives to an all-gather of states."""
    sent: list[int] = []
    gather = sequence_parallel._all_gather

    def counted(group: dist.ProcessGroup, output: Tensor, message: Tensor, options: Any) -> Any:
        sent.append(message.nbytes)
        return gather(group, output, message, options)

    with mock.patch.object(sequence_parallel, "_all_gather", counted):
        yield sent


def _compare(network: nn.Module, expected: dict[str, Tensor]) -> dict[str, Any]:
    """The relative errors of the gradients, a number for each weight."""
    if not expected:  # there was no room for the whole on one GPU
        return {}
    gradients: dict[str, Any] = {name: p.grad for name, p in network.named_parameters()}
    errors = {name: relative_error(gradient.full_tensor(), expected[name]) for name, gradient in gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    median = statistics.median(errors.values())
    return {"largest_gradient_error": errors[worst], "of": worst, "median_gradient_error": median}


def _median(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Milliseconds of the slowest rank, the median of so many calls, or of at least three that take ten seconds."""
    samples: list[float] = []
    while len(samples) < repeats and (len(samples) < 3 or sum(samples) < 10_000):
        samples.append(slowest_ms(call, device))
    return statistics.median(samples)


def rows(scale: Scale) -> Iterator[str]:
    """What is measured with the processes that torchrun started."""
    yield from map(str, [*scale.rows, *scale.meshes(int(os.environ.get("WORLD_SIZE", "1")))])


def show(report: Report) -> Iterator[Shown]:
    """A row for each size, way and number of tokens: alone, together, and the share of the speed that is left."""
    records = report.find(SUITE)
    table, errors = [], []
    for name in dict.fromkeys(r["row"] for r in records if r["row"] != "rates"):
        alone, *rest = (r for r in records if r["row"] == name)
        for together in rest:
            speeds = [r.get("tokens_per_second", 0.0) for r in (alone, together)]
            share = f"{speeds[1] / speeds[0]:.3f}" if all(speeds) else ""
            table.append([
                alone["size"], alone["way"], f"{alone['B']} x {alone['T']:,}", f"{together['ranks']}",
                *(f"{speed:,.0f}" if speed else "out of memory" for speed in speeds), share,
                *(f"{r['peak_bytes'] / 1e9:.0f}" if "peak_bytes" in r else "" for r in (alone, together)),
            ])  # fmt: skip
            if "largest_gradient_error" in together:
                errors.append(
                    f"{name}: loss {alone['loss']:.6g} alone, {together['loss']:.6g} together; gradients differ by "
                    f"{together['largest_gradient_error']:.1e} at most ({together.get('of', 'unnamed')}), "
                    f"{together['median_gradient_error']:.1e} in the median"
                )
    if table:
        columns = ["size", "way", "tokens a GPU", "GPUs", "alone", "together", "share", "GB alone", "together"]
        yield Table("Training on many GPUs: tokens per second and GPU", columns, table, words=4)
    yield from errors
    yield from _show_meshes([r for r in records if "losses" in r])
    for r in report.find(SUITE, row="rates"):
        yield f"copy {r['copied_per_second'] / 1e12:.2f} TB/s, all-gather {r['gathered_per_second'] / 1e9:.0f} GB/s"


def _show_meshes(records: list[Record]) -> Iterator[Shown]:
    """A row for each size and mesh: speed, memory, the first and the last loss, and what a step sends."""
    table = [
        [
            r["size"], r["way"], f"{r['B']} x {r['T']:,}", f"{r['ms']:.3g}", f"{r['tokens_per_second']:,.0f}",
            f"{r['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in r else "", f"{r['losses'][0]:.5f}",
            f"{r['losses'][-1]:.5f}", f"{r['largest_loss_difference']:.1e}" if "largest_loss_difference" in r else "",
            *(f"{r[key]:,}" for key in ("state_bytes", "state_bytes_at_half", "state_bytes_by_formula")),
        ]
        for r in records
    ]  # fmt: skip
    if table:
        sent = [f"bytes of states\n{name}" for name in ("sent", "at T / 2", "by formula")]
        columns = ["size", "dp x sp", "tokens a GPU", "ms", "tokens/s\na GPU", "GB", "first loss", "last loss"]
        yield Table("The same steps on every mesh", [*columns, "largest\ndifference", *sent], table, words=3)


CASE = Case(measure, show, SCALES, needs=("transformers",), ranks=True, rows=rows)
