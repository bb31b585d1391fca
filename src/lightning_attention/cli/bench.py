"""``lightning-attention bench``: time and memory against sequence length, as a table, a JSON file and a figure."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Device(str, Enum):
    """Where to measure."""

    cpu = "cpu"
    cuda = "cuda"


#: What this command measured before benchmarks/ did.
MOVED = {"shapes", "host", "packed", "constancy", "serving", "serve", "minimax"}


def bench(
    operation: Annotated[str, typer.Argument(hidden=True, metavar="op")] = "op",
    suite: Annotated[str, typer.Option(hidden=True)] = "lengths",
    peers: Annotated[
        str | None,
        typer.Option(
            help="What to compare with: sdpa (PyTorch's softmax attention; so too if this is not given), or '' for "
            "nothing. Other libraries are compared with in a checkout of the repository, by python -m benchmarks."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter lengths, under 40 s on two cores.")] = False,
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
    """Measure time and memory per token against sequence length on this machine, beside softmax attention.

    Prints tables, and writes a JSON file (device, versions, command, every figure) and a PNG of the time per token
    against the sequence length. The JSON file is written as it goes: a run cut short leaves what it has. A peer that
    fails is shown as such; a failure of our own makes the exit status 1.
    """
    import torch

    from lightning_attention.bench import case, lengths
    from lightning_attention.bench.peers import SDPA

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        for option, asked, known in (("--suite", suite, "lengths"), ("bench", operation, "op")):
            if asked != known:
                cases = asked.replace(",", " ") if MOVED.issuperset(asked.split(",")) else "--help"
                raise case.OptionError(
                    option,
                    f"{asked!r} is not measured by this command, which measures time against length; other cases are "
                    f"in a checkout of the repository: python -m benchmarks {cases}",
                )
        at = case.find_device(device.value if device else None)
        failures = case.run(
            lengths.CASE,
            "op-lengths",
            at,
            known_peers={"sdpa": SDPA},
            quick=quick,
            peers=peers,
            backend=backend,
            out=out,
        )
    except case.OptionError as error:
        more = "; a checkout of the repository has more: python -m benchmarks lengths" * (error.option == "--peers")
        raise typer.BadParameter(f"{error}{more}", param_hint=error.option) from None
    if failures:
        raise typer.Exit(1)
