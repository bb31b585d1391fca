"""``lightning-attention bench``: time and memory, as a table, a JSON file and a figure."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch


class Operation(str, Enum):
    """What there is to measure."""

    op = "op"
    serve = "serve"
    minimax = "minimax"


class Device(str, Enum):
    """Where to measure."""

    cpu = "cpu"
    cuda = "cuda"


#: The GPU suites that ``h200`` stands for, in the order they run: what matters most comes first.
H200 = ("shapes", "host", "packed", "constancy")
SUITES = ("lengths", "h200", *H200, "serving")


def _names(text: str, option: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not among {', '.join(known)}", param_hint=option)
    return names


def bench(
    operation: Annotated[
        Operation,
        typer.Argument(
            help="What to measure: op is attention over sequences, serve is generation, minimax is a layer and a small "
            "model of transformers' MiniMax, with its own attention and with ours."
        ),
    ] = Operation.op,
    suite: Annotated[
        str,
        typer.Option(
            help="lengths: time and memory per token against T, on any device. h200: all of the following, for a GPU "
            "with 80 GB or more. shapes: training shapes, against the memory floor and float64. host: CPU time of a "
            "call. packed: batches of mixed lengths. constancy: T from 2,048 to 1,048,576 at equal B·T, of "
            "ours alone unless it is named with --peers. "
            "serving: decode, prefill and speculation over a pool of states, on any device. Several with commas."
        ),
    ] = "lengths",
    peers: Annotated[
        str | None,
        typer.Option(
            help="What to compare with, with commas: sdpa (PyTorch's softmax attention; what is compared with if this "
            "is not given), fla, lightning_attn; for serving seg_la and vllm (both from SGLang's wheel), fla."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="lengths and serve: fewer and shorter, under 40 s on two cores.")
    ] = False,
    backend: Annotated[str | None, typer.Option(help="triton, tiled or reference; by device if not given.")] = None,
    device: Annotated[
        Device | None, typer.Option(help="A GPU (cuda, ROCm too) where there is one, if not given.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that PyTorch computes with on a CPU; as many as it chooses if not given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the figure.")] = Path("runs/bench"),
) -> None:
    """Measure speed and memory on this machine, beside softmax attention and other libraries.

    Prints tables, and writes a JSON file (device, versions, command, every figure) and a PNG of the time per token
    against the sequence length. The JSON file is written as it goes: a run cut short leaves what it has. A peer that
    is missing or fails is shown as such; a failure of our own makes the exit status 1.
    """
    from functools import partial

    import torch
    from rich.console import Console
    from rich.markup import escape

    from lightning_attention.bench import op, plot, serving_ops, serving_ops_report, suites, tables
    from lightning_attention.bench.peers import PEERS, ours
    from lightning_attention.bench.peers import peers as peers_named
    from lightning_attention.bench.report import Report, environment, package_version, slug
    from lightning_attention.bench.serving_peers import SERVING_PEERS, servers

    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no GPU here", param_hint="--device")
    if threads is not None:
        torch.set_num_threads(threads)
    place = torch.device(device.value if device else "cuda" if torch.cuda.is_available() else "cpu")
    if operation is not Operation.op:
        for option, changed in {
            "--suite": suite != "lengths",
            "--peers": peers is not None,
            "--backend": backend,
            "--quick": quick and operation is Operation.minimax,
        }.items():
            if changed:
                raise typer.BadParameter(f"{operation.value} has no such choice", param_hint=option)
        if operation is Operation.serve:
            _serve(place, quick, out)
        else:
            _minimax(place, out)
        return
    named = _names(suite, "--suite", SUITES)
    parts = [p for name in named for p in (H200 if name == "h200" else (name,))]
    if place.type != "cuda" and not {"lengths", "serving"}.issuperset(parts):
        raise typer.BadParameter(f"{suite} needs a GPU, and the device is {place}", param_hint="--suite")
    if backend and "serving" in parts:
        raise typer.BadParameter("serving has no such choice", param_hint="--backend")
    of_sequences = set(parts) != {"serving"}
    known = (*(PEERS if of_sequences else ()), *(SERVING_PEERS if "serving" in parts else ()))
    chosen = _names(
        ("sdpa" if of_sequences else "") if peers is None else peers, "--peers", tuple(dict.fromkeys(known))
    )
    implementations = [ours(backend), *peers_named([x for x in chosen if of_sequences and x in PEERS], place)]
    serving_servers = servers([x for x in chosen if x in SERVING_PEERS])
    # fla tunes itself for minutes before its first call at 1,048,576 tokens; the figure with peers is that of lengths.
    constant = implementations if peers is not None and "constancy" in named else implementations[:1]

    stem = f"{operation.value}-{{}}-{slug(place)}"
    about = environment(place, implementations)
    if "serving" in parts:
        about["peers"] |= {s.package: package_version(s.package) for s in serving_servers if s.name in SERVING_PEERS}
    report = Report(out / (stem.format(suite.replace(",", "-")) + ".json"), about)
    say = partial(print, flush=True)
    runs = {
        "lengths": lambda: op.lengths(report, implementations, op.SWEEPS[place.type, quick], place, "lengths", say),
        "shapes": lambda: suites.shapes(report, implementations, place, say),
        "host": lambda: suites.host(report, implementations, place, say),
        "packed": lambda: suites.packed(report, place, say, backend=backend),
        "constancy": lambda: suites.constancy(report, constant, place, say),
        "serving": lambda: serving_ops.serving(report, serving_servers, serving_ops.SCALES[place.type], place, say),
    }
    for part in parts:
        runs[part]()

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)
    for part in parts:
        records = report.find(part)
        if part == "serving":
            console.print(serving_ops_report.table(records))
            for line in serving_ops_report.summary(records):
                console.print(line, highlight=False)
            figure = out / (stem.format(part) + ".png")
            serving_ops_report.figure(records, report.environment, figure)
            console.print(f"figure   {figure}", highlight=False, soft_wrap=True)
            continue
        for table in tables.of_suite(part, records, report):
            console.print(table)
        if part in ("lengths", "constancy", "shapes") and any("ms" in r for r in records):
            if part == "shapes":
                records = plot.by_length(records)
            else:
                for line in tables.constant(records):
                    console.print(line, highlight=False)
            figure = out / (stem.format(part) + ".png")
            plot.time_per_token(records, report.environment, figure)
            console.print(f"figure   {figure}", highlight=False, soft_wrap=True)
    console.print(f"results  {report.path}", highlight=False, soft_wrap=True)
    failures = report.find_errors(implementations[0].name)
    for failure in failures:
        console.print(f"[red]our own call failed:[/red] {escape(str(failure))}", highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _serve(device: "torch.device", quick: bool, out: Path) -> None:
    """Generation of our model and of a softmax model: tokens per second, time of a step, memory."""
    from functools import partial

    from rich.console import Console

    from lightning_attention.bench import serving, serving_report
    from lightning_attention.bench.report import Report, environment, package_version, slug

    about = environment(device) | {"transformers": package_version("transformers")}
    report = Report(out / f"serve-{slug(device)}.json", about)
    serving.serving(report, serving.SCALES[device.type, quick], device, partial(print, flush=True))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(serving_report.table(report.records))
    for line in serving_report.constant(report.records):
        console.print(line, highlight=False, soft_wrap=True)
    figure = report.path.with_suffix(".png")
    serving_report.figure(report.records, about, figure)
    console.print(f"figure   {figure}\nresults  {report.path}", highlight=False, soft_wrap=True)


def _minimax(device: "torch.device", out: Path) -> None:
    """Transformers' MiniMax with its own attention and with ours; exit status 1 where ours is not right."""
    from functools import partial

    from rich.console import Console

    from lightning_attention.bench import minimax
    from lightning_attention.bench.peers import OURS
    from lightning_attention.bench.report import Report, environment, package_version, slug

    about = environment(device) | {"transformers": package_version("transformers")}
    report = Report(out / f"minimax-{slug(device)}.json", about)
    minimax.run(report, device, partial(print, flush=True))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)
    for table in minimax.tables(report):
        console.print(table)
    console.print(f"results  {report.path}", highlight=False, soft_wrap=True)
    failures = report.find_errors(OURS)
    for failure in failures:
        console.print(f"[red]ours is not right:[/red] {failure['error']}", highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)
