"""`lightning-attention evaluate`: the loss of a trained model on a text, as a table or JSON."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_attention.cli.train import memory_error
from lightning_attention.training.config import TrainConfig, make_config

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_attention.training.evaluation import Evaluation


def _help(setting: str) -> str:
    """What `train` says of a setting that this command has too."""
    text: str = TrainConfig.__dataclass_fields__[setting].metadata["help"]
    return text


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A run, a checkpoint, or a Hugging Face folder.", show_default=False),
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT", help="Text files, folders or globs; - reads standard input.", show_default=False
        ),
    ],
    *,
    seq_len: Annotated[int, typer.Option(min=2, max=1 << 31, help="Tokens in a window.")] = 1024,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens that a window counts; the ones before are read alone. [default: all but the first]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows at a time. [default: as many as have 16,384 tokens]")
    ] = None,
    encoding: Annotated[str, typer.Option(help=_help("encoding"))] = TrainConfig.encoding,
    text_field: Annotated[str, typer.Option(help=_help("text_field"))] = TrainConfig.text_field,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[str, typer.Option(help=_help("precision"))] = TrainConfig.precision,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the JSON to this file too.", show_default=False)
    ] = None,
) -> None:
    """Measure a trained model on text: nats per token, bits per byte, and the loss by position.

    INPUT is read as `train` reads it. Windows go through the text as one stream with an end-of-text token after every
    document, and each token is counted once. The table says how the loss falls with the tokens that a window has before
    the one predicted: where it goes on falling, the model uses a long context.
    """
    # What is wrong is said before transformers is loaded.
    text = make_config({"inputs": inputs, "encoding": encoding, "text_field": text_field, "precision": precision})
    from rich.console import Console

    from lightning_attention.training.checkpoint import atomic_text
    from lightning_attention.training.evaluation import evaluate as measure
    from lightning_attention.training.runtime import Runtime
    from lightning_attention.training.trained import open_trained

    runtime = Runtime.choose(device, precision)
    trained = open_trained(model)
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    began = time.perf_counter()
    try:
        with console.status("reading the text") as status:
            found = measure(
                trained,
                text,
                runtime,
                seq_len=seq_len,
                stride=stride,
                batch_size=batch_size,
                report=console.print,
                advance=lambda done, total: status.update(f"{done / total:.0%} of {total / 1e6:,.1f} MB"),
            )
    except (MemoryError, RuntimeError) as error:
        raise memory_error(error, "--batch-size or --seq-len") from error
    record = {
        "model": str(trained.folder),
        "kind": trained.model.config.model_type,
        "weights": sum(p.numel() for p in trained.model.parameters()),
        "inputs": inputs,
        "seq_len": seq_len,
        "stride": stride or seq_len - 1,
        "windows": "joined documents" if trained.joins_documents else "separate documents",
        **asdict(found),
        "device": str(runtime.device),
        "precision": "bf16" if runtime.bf16 else "float32",
        "seconds": round(time.perf_counter() - began, 3),
    }
    lines = json.dumps(record, indent=1) + "\n"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_text(out, lines)
    if as_json:
        sys.stdout.write(lines)
    else:
        _show(Console(highlight=False), record, found)


def _show(console: Console, record: dict[str, Any], found: Evaluation) -> None:
    from rich.table import Table

    table = Table(title=f"{record['model']}, {record['kind']}, {record['weights'] / 1e6:.2f} M weights")
    for heading in ("tokens before", "tokens", "nats per token"):
        table.add_column(heading, justify="right")
    for bucket in found.by_position:
        span = str(bucket.first) if bucket.first == bucket.last else f"{bucket.first:,} to {bucket.last:,}"
        table.add_row(span, f"{bucket.tokens:,}", f"{bucket.loss:.4f}")
    table.add_section()
    table.add_row("all", f"{found.tokens:,}", f"{found.loss:.4f}")
    console.print(table)
    about = f"{found.text_bytes:,} bytes in {found.documents:,} documents"
    console.print(f"{found.bits_per_byte:.4f} bits per byte of {about}; windows of {record['windows']}")
