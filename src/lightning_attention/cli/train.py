"""`lightning-attention train`: the options of TrainConfig, and a progress bar around the trainer."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from datetime import timedelta
from functools import partial
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import typer

from lightning_attention.cli.streams import LastingStream
from lightning_attention.errors import InputError
from lightning_attention.training.config import TrainConfig, make_config, read_toml

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_attention.training.progress import Outcome, Progress
    from lightning_attention.training.trainer import Trainer

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
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume", help="Go on from the newest checkpoint in --out, or start.", rich_help_panel="Run"
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again where --out holds a run.", rich_help_panel="Run")
    ] = False,
) -> None:
    """Train a small TransNormer on text, on a CPU or a GPU.

    Without INPUT it trains on the English of pydoc's topics, which every Python carries. Ctrl-C saves and stops;
    --resume goes on from there as if nothing had happened. Every checkpoint is a Hugging Face folder.

    The exit status is 0 when the run is complete, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP; 1 when it
    diverged or a disk failed it, 2 when something given cannot be used.
    """
    if (resume or auto_resume) and overwrite:
        raise InputError("--resume goes on with a run and --overwrite deletes it; give one of them")
    _refuse_several_processes()
    settings = {**(read_toml(config) if config is not None else {}), **settings}
    asked = make_config(settings)  # what is wrong is said before transformers is loaded
    from rich.console import Console

    from lightning_attention.errors import DiskError, DivergedError, StoppedAtOnce
    from lightning_attention.training.trainer import Trainer

    console = Console(file=cast("IO[str]", LastingStream(sys.stderr)), highlight=False, soft_wrap=True, markup=False)
    try:
        with console.status("reading the text"):
            trainer = Trainer(
                asked, resume="auto" if auto_resume else resume, overwrite=overwrite, report=console.print
            )
    except DiskError as error:
        print(f"error: {error}; what was in the folder is as it was", file=sys.stderr)
        raise typer.Exit(1) from error
    except (MemoryError, RuntimeError) as error:
        raise _memory_error(error) from error
    except KeyboardInterrupt as error:
        print("stopped before the first step; what was in the folder is as it was", file=sys.stderr)
        raise typer.Exit(130) from error
    console.print(_introduction(trainer))
    show = _ShowBar if console.is_interactive else _ShowLines
    try:
        with show(console, trainer) as report:
            outcome = trainer.fit(report, _acknowledger(console, trainer))
    except (DivergedError, DiskError) as error:
        console.print(f"error: {error}; {trainer.folder.kept()}")
        raise typer.Exit(1) from error
    except (MemoryError, RuntimeError) as error:
        raise _memory_error(error) from error
    except StoppedAtOnce as stop:
        console.print(f"stopped by {stop.signal_name} at once: {trainer.folder.kept()}")
        raise typer.Exit(_status(stop.signal_name)) from stop
    _conclude(outcome, partial(print, file=LastingStream(sys.stdout)))
    if outcome.stopped_by:
        raise typer.Exit(_status(outcome.stopped_by))


def _refuse_several_processes() -> None:
    """A launcher's processes would all train the same model."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError(
            f"train runs in one process, and WORLD_SIZE is {os.environ['WORLD_SIZE']}: start it without torchrun"
        )


def _memory_error(error: Exception) -> Exception:
    """The error itself, or what to do about it where it is that a model or a batch does not fit."""
    text = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return InputError(f"not enough memory: {text}; try a smaller width, batch_size or seq_len")
    return error


def _status(signal_name: str) -> int:
    """What a shell makes of a process that died of that signal, so that `train && generate` stops."""
    return 128 + signal.Signals[signal_name]


def _introduction(trainer: Trainer) -> str:
    config, data = trainer.config, trainer.data
    weights = sum(p.numel() for p in trainer.model.parameters())
    precision = "bf16" if trainer.learner.runtime.bf16 else "float32"
    start = f"going on from {trainer.resumed_from}" if trainer.resumed_from else "starting"
    return (
        f"{start}: {weights / 1e6:.2f} M weights, {precision} on {trainer.learner.runtime.device}; "
        f"{len(data.train):,} tokens to train on, {len(data.val):,} held out, {config.tokens_per_step:,} in a step"
    )


def _acknowledger(console: Console, trainer: Trainer) -> Callable[[str, bool], None]:
    def acknowledge(name: str, again: bool) -> None:
        if again:
            console.print(f"{name} again: stopping now; {trainer.folder.kept()}")
        else:
            console.print(
                f"{name}: finishing step {trainer.step + 1}, then saving it; a second signal stops at once, without it"
            )

    return acknowledge


def _numbers(progress: Progress) -> tuple[str, str]:
    """The losses and the speed, as far as they are known."""
    loss = [] if progress.bits_per_byte is None else [f"loss {progress.bits_per_byte:.3f}"]
    if held_out := progress.held_out:
        loss.append(f"held out {held_out.bits_per_byte:.3f} at step {held_out.step}")
    speed = "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f} tokens/s"
    return ", ".join(loss) + " bits/byte" if loss else "", speed


def _as_fits(progress: Progress, width: int) -> str:
    """The losses and the speed, or as many of them as there is room for: 80 columns have none for the speed."""
    loss, speed = _numbers(progress)
    choices = (f"{loss} {speed}".strip(), loss, loss.partition(",")[0])
    return next((numbers for numbers in choices if len(numbers) <= width), "")


class _ShowBar:
    """A bar on the terminal's last line."""

    def __init__(self, console: Console, trainer: Trainer) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        # What may not wrap is not cut either, as long as the bar can give way.
        steps, left = (kind(table_column=Column(no_wrap=True)) for kind in (MofNCompleteColumn, TimeRemainingColumn))
        numbers = TextColumn("{task.fields[numbers]}")
        self._bar = Bar(
            steps, BarColumn(bar_width=None), numbers, left, TextColumn("left"), console=console, expand=True
        )
        self._task = self._bar.add_task("", total=trainer.planned_steps, completed=trainer.step, numbers="")
        self._console = console

    def __enter__(self) -> Callable[[Progress], None]:
        self._bar.start()
        return self._report

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _report(self, progress: Progress) -> None:
        steps = f"{progress.planned_steps}/{progress.planned_steps}"
        numbers = _as_fits(progress, self._console.width - len(f"{steps} ----  0:00:00 left"))
        self._bar.update(self._task, completed=progress.step, total=progress.planned_steps, numbers=numbers)


class _ShowLines:
    """A line for every logged step, for a file or a pipe."""

    def __init__(self, console: Console, trainer: Trainer) -> None:
        self._print = console.print
        self._tokens_per_step = trainer.config.tokens_per_step

    def __enter__(self) -> Callable[[Progress], None]:
        return self._report

    def __exit__(self, *error: object) -> None:
        pass

    def _report(self, progress: Progress) -> None:
        if not progress.logged:
            return
        loss, speed = _numbers(progress)
        planned, left = "", ""
        if progress.planned_steps is not None:
            planned = f"/{progress.planned_steps}"
            if progress.tokens_per_second:
                steps = progress.planned_steps - progress.step
                left = f"{timedelta(seconds=round(steps * self._tokens_per_step / progress.tokens_per_second))} left"
        self._print("  ".join(part for part in (f"step {progress.step}{planned}", loss, speed, left) if part))


def _conclude(outcome: Outcome, say: Callable[[str], None]) -> None:
    if outcome.stopped_by:
        planned = "" if outcome.planned_steps is None else f" of {outcome.planned_steps}"
        say(f"stopped by {outcome.stopped_by} after step {outcome.step}{planned}; --resume goes on from there")
    if outcome.held_out is not None:
        say(f"held-out loss: {outcome.held_out.bits_per_byte:.3f} bits per byte after {outcome.held_out.step} steps")
    say(f"checkpoint:    {outcome.checkpoint}")
    say(f"loss plot:     {outcome.plot}")
    say(f"metrics:       {outcome.metrics}")
