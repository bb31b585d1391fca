"""`lightning-attention train`: the options of TrainConfig, and a progress bar around the trainer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_attention.training.config import InputError, TrainConfig, read_toml

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from lightning_attention.training.trainer import Outcome, Progress, Trainer

_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def _parameter(setting: Field[Any]) -> inspect.Parameter:
    """A setting as an option that is None unless it is given, so that the configuration file can speak first."""
    annotation: Any
    if setting.name == "inputs":
        about = typer.Argument(metavar="INPUT", help=setting.metadata["help"], show_default=False)
        annotation = Annotated[list[str] | None, about]
    else:
        flag = "--" + setting.name.replace("_", "-")
        kind = _TYPES[str(setting.type).removesuffix(" | None")]
        about = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=_help(setting),
            show_default=False,
            rich_help_panel=setting.metadata["group"],
        )
        annotation = Annotated[kind | None, about]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(setting: Field[Any]) -> str:
    """The option's own default is None; what the reader wants to know is the setting's."""
    default = ("no", "yes")[setting.default] if isinstance(setting.default, bool) else setting.default
    return setting.metadata["help"] + ("" if default is None else f" [default: {default}]")


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting of TrainConfig, in place of its `settings`."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    parameters = [*map(_parameter, fields(TrainConfig)), *own]

    def wrapped(**values: Any) -> None:
        given = {p.name: values.pop(p.name) for p in parameters if p not in own}
        command(settings={name: value for name, value in given.items() if value is not None}, **values)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


@_with_settings
def train(
    *,
    settings: dict[str, Any],
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.toml",
            help="Read settings from this file: the names below with _ for -. Options on the command line win.",
            rich_help_panel="Run",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.", rich_help_panel="Run")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again where --out holds a run.", rich_help_panel="Run")
    ] = False,
) -> None:
    """Train a small TransNormer on text, on a CPU or a GPU.

    Without INPUT it trains on the English of pydoc's topics, which every Python carries. Ctrl-C saves and stops;
    --resume goes on from there as if nothing had happened. Every checkpoint is a Hugging Face folder.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite deletes it; give one of them")
    settings = {**(read_toml(config) if config else {}), **settings}
    from rich.console import Console

    from lightning_attention.training.trainer import DivergedError, Trainer

    console = Console(stderr=True, highlight=False)
    with console.status("reading the text"):
        trainer = Trainer(settings, resume=resume, overwrite=overwrite)
    console.print(_introduction(trainer))
    bar = _bar(console)
    try:
        with bar:
            outcome = trainer.fit(_reporter(bar, trainer))
    except (DivergedError, OSError) as error:  # an OSError here is a full or lost disk
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    _conclude(outcome)


def _introduction(trainer: Trainer) -> str:
    config, data = trainer.config, trainer.data
    weights = sum(p.numel() for p in trainer.model.parameters())
    precision = "bf16" if trainer.runtime.bf16 else "float32"
    start = f"going on from {trainer.resumed_from}" if trainer.resumed_from else "starting"
    return (
        f"{start}: {weights / 1e6:.2f} M weights, {precision} on {trainer.runtime.device}; "
        f"{len(data.train):,} tokens to train on, {len(data.val):,} held out, {config.tokens_per_step:,} in a step"
    )


def _bar(console: Any) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        expand=True,
    )


def _reporter(bar: Bar, trainer: Trainer) -> Callable[[Progress], None]:
    task = bar.add_task("", total=trainer.planned_steps, completed=trainer.step, loss="", speed="")

    def report(progress: Progress) -> None:
        loss = "" if progress.bits_per_byte is None else f"loss {progress.bits_per_byte:.2f}"
        if progress.val_bits_per_byte is not None:
            loss += f" held out {progress.val_bits_per_byte:.2f} bits/byte"
        speed = "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f} tokens/s"
        bar.update(task, completed=progress.step, total=progress.planned_steps, loss=loss, speed=speed)

    return report


def _conclude(outcome: Outcome) -> None:
    if outcome.stopped_by:
        planned = "" if outcome.planned_steps is None else f" of {outcome.planned_steps}"
        typer.echo(f"stopped by {outcome.stopped_by} after step {outcome.step}{planned}; --resume goes on from there")
    elif outcome.val_bits_per_byte is not None:
        typer.echo(f"held-out loss: {outcome.val_bits_per_byte:.3f} bits per byte after {outcome.step} steps")
    typer.echo(f"checkpoint:    {outcome.checkpoint}")
    typer.echo(f"loss plot:     {outcome.plot}")
    typer.echo(f"metrics:       {outcome.metrics}")
