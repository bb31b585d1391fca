"""`lightning-attention train`: the options of TrainConfig, and a progress bar around the trainer."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from datetime import timedelta
from functools import partial
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

import typer

from lightning_attention.cli.streams import LastingStream
from lightning_attention.errors import (
    DiskError,
    DivergedError,
    InputError,
    StoppedAtOnce,
    is_told_elsewhere,
    told_elsewhere,
)
from lightning_attention.training.config import TrainConfig, make_config, read_toml

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_attention.training.progress import Outcome, Progress
    from lightning_attention.training.trainer import Trainer


def _parameter(setting: Field[Any], kind: Any) -> inspect.Parameter:
    """A setting as an option that is None unless it is given, so that the configuration file comes first."""
    text = setting.metadata["help"]
    if setting.name == "inputs":
        kind, about = list[str], typer.Argument(metavar="INPUT", help=text, show_default=False)
    else:
        flag, default = setting.name.replace("_", "-"), setting.default
        if kind is bool and default is not None:
            default = "yes" if default else "no"
        about = typer.Option(
            f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
            help=text if default is None else f"{text} [default: {default}]",
            show_default=False,
            rich_help_panel=setting.metadata["group"],
        )
    annotation = Annotated[kind | None, about]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting of TrainConfig, in place of its `settings`."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    kinds = get_type_hints(TrainConfig)
    parameters = [*(_parameter(setting, kinds[setting.name]) for setting in fields(TrainConfig)), *own]

    def wrapped(**values: Any) -> None:
        given = {setting.name: values.pop(setting.name) for setting in fields(TrainConfig)}
        command(settings={name: value for name, value in given.items() if value is not None}, **values)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _own(flag: str, text: str, metavar: str | None = None) -> Any:
    """An option that is not a setting."""
    return typer.Option(flag, help=text, metavar=metavar, rich_help_panel="Run")


@_with_settings
def train(
    *,
    settings: dict[str, Any],
    config: Annotated[
        str | None,
        _own(
            "--config",
            "Read settings from this file: the names below with _ for -. Options on the command line win.",
            metavar="FILE.toml",
        ),
    ] = None,
    resume: Annotated[bool, _own("--resume", "Go on from the newest checkpoint in --out.")] = False,
    auto_resume: Annotated[bool, _own("--auto-resume", "Go on from the newest checkpoint in --out, or start.")] = False,
    overwrite: Annotated[bool, _own("--overwrite", "Start again where --out holds a run.")] = False,
) -> None:
    """Train a TransNormer, or a Llama to compare it with, on text: on a CPU, a GPU, or in the processes of torchrun.

    Without INPUT it trains on the English of pydoc's topics, which every Python carries. Ctrl-C saves and stops;
    --resume goes on from there as if nothing had happened. Every checkpoint is a Hugging Face folder.

    The exit status is 0 when the run is complete, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP; 1 when it
    diverged or a disk failed it, 2 when something given cannot be used.
    """
    if (resume or auto_resume) and overwrite:
        raise InputError("--resume goes on with a run and --overwrite deletes it; give one of them")
    # What is wrong is said before transformers is loaded, and once on a host.
    try:
        asked = make_config({**(read_toml(config) if config is not None else {}), **settings})
    except InputError as error:
        raise error if os.environ.get("LOCAL_RANK", "0") == "0" else told_elsewhere(error) from None
    from rich.console import Console

    from lightning_attention.training.trainer import Trainer

    lasting = cast("IO[str]", LastingStream(sys.stderr))
    # Where there are several processes, the first alone shows how it goes.
    quiet = os.environ.get("RANK", "0") != "0"
    console = Console(file=lasting, highlight=False, soft_wrap=True, markup=False, quiet=quiet)

    def tell(error: BaseException, text: str) -> None:
        if not is_told_elsewhere(error):
            print(text, file=lasting)

    try:
        with console.status("reading the text"):
            how: bool | Literal["auto"] = "auto" if auto_resume else resume
            trainer = Trainer(asked, resume=how, overwrite=overwrite, report=console.print)
    except DiskError as error:
        tell(error, f"error: {error}; what was in the folder is as it was")
        raise typer.Exit(1) from error
    except (MemoryError, RuntimeError) as error:
        raise memory_error(error) from error
    except KeyboardInterrupt as error:
        tell(error, "stopped before the first step; what was in the folder is as it was")
        raise typer.Exit(130) from error
    console.print(_introduction(trainer))
    show = _show_bar if console.is_interactive else _show_lines
    try:
        with show(console, trainer) as report:
            outcome = trainer.fit(_with_samples(console, report), None if quiet else _acknowledger(console, trainer))
        trainer.team.leave()
    except (DivergedError, DiskError) as error:
        tell(error, f"error: {error}; {trainer.folder.kept()}")
        raise typer.Exit(1) from error
    except (MemoryError, RuntimeError) as error:
        if trainer.team.is_launched and _is_of_the_connection(error):
            tell(error, f"error: process {trainer.team.rank} lost another one of the run; {trainer.folder.kept()}")
            raise typer.Exit(1) from error
        raise memory_error(error) from error
    except StoppedAtOnce as stop:
        tell(stop, f"stopped by {stop.signal_name} at once: {trainer.folder.kept()}")
        raise typer.Exit(_status(stop.signal_name)) from stop
    if not quiet:
        _conclude(outcome, partial(print, file=LastingStream(sys.stdout)))
    if outcome.stopped_by:
        raise typer.Exit(_status(outcome.stopped_by))


def _is_of_the_connection(error: Exception) -> bool:
    """Whether this is PyTorch's error when a process that it talks to has died."""
    return "gloo" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")


def memory_error(error: Exception, smaller: str = "width, batch_size or seq_len") -> Exception:
    """The error itself, or advice if a model or a batch does not fit in memory."""
    text = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        found = InputError(f"not enough memory: {text}; try a smaller {smaller}")
        return told_elsewhere(found) if is_told_elsewhere(error) else found
    return error


def _status(signal_name: str) -> int:
    """The exit status that a shell gives a process killed by that signal, so that `train && generate` stops."""
    return 128 + signal.Signals[signal_name]


def _introduction(trainer: Trainer) -> str:
    config, data = trainer.config, trainer.data
    weights = sum(p.numel() for p in trainer.model.parameters())
    precision = "bf16" if trainer.learner.runtime.bf16 else "float32"
    start = f"going on from {trainer.resumed_from}" if trainer.resumed_from else "starting"
    remark = f"; {trainer.meter.remark}" if trainer.meter and trainer.meter.remark else ""
    team = f" in {trainer.team.size} processes ({trainer.learner.mesh})" if trainer.team.is_launched else ""
    return (
        f"{start}: {weights / 1e6:.2f} M weights, {precision} on {trainer.learner.runtime.device}{team}; "
        f"{len(data.train):,} tokens to train on, {len(data.val):,} held out, {config.tokens_per_step:,} in a step"
        f"{remark}"
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
    if use := progress.gpu:
        mfu = "" if use.mfu is None else f"MFU {use.mfu:.2f}, "
        speed = f"{use.tokens_per_second:,.0f} tokens/s/GPU, {mfu}{use.peak_memory / 2**30:.1f} GiB"
    return ", ".join(loss) + " bits/byte" if loss else "", speed


def _as_fits(progress: Progress, width: int) -> str:
    """The losses and the speed, or as many of them as fit: 80 columns leave no room for the speed."""
    loss, speed = _numbers(progress)
    choices = (f"{loss} {speed}".strip(), f"{loss} {speed.partition(', ')[0]}".strip(), loss, loss.partition(",")[0])
    return next((numbers for numbers in choices if len(numbers) <= width), "")


def _with_samples(console: Console, report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Samples on a line each, before the rest of their step."""

    def with_samples(progress: Progress) -> None:
        if progress.sample is not None:
            # A model may write what a terminal obeys.
            text = "".join(c if c.isprintable() else " " for c in progress.sample)
            console.print(f"sample after step {progress.step}: {text}")
        report(progress)

    return with_samples


@contextmanager
def _show_bar(console: Console, trainer: Trainer) -> Iterator[Callable[[Progress], None]]:
    """A bar on the terminal's last line."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    # What may not wrap is not cut either, as long as the bar can give way.
    steps, left = (kind(table_column=Column(no_wrap=True)) for kind in (MofNCompleteColumn, TimeRemainingColumn))
    numbers = TextColumn("{task.fields[numbers]}")
    columns = (steps, BarColumn(bar_width=None), numbers, left, TextColumn("left"))
    with Bar(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=trainer.planned_steps, completed=trainer.step, numbers="")

        def report(progress: Progress) -> None:
            planned = f"{progress.planned_steps}/{progress.planned_steps}"
            shown = _as_fits(progress, console.width - len(f"{planned} ----  0:00:00 left"))
            bar.update(task, completed=progress.step, total=progress.planned_steps, numbers=shown)

        yield report


@contextmanager
def _show_lines(console: Console, trainer: Trainer) -> Iterator[Callable[[Progress], None]]:
    """A line for every logged step, for a file or a pipe."""

    def report(progress: Progress) -> None:
        if not progress.logged:
            return
        loss, speed = _numbers(progress)
        step, left = f"step {progress.step}", ""
        if progress.planned_steps is not None:
            step += f"/{progress.planned_steps}"
            if progress.tokens_per_second:
                tokens = (progress.planned_steps - progress.step) * trainer.config.tokens_per_step
                left = f"{timedelta(seconds=round(tokens / progress.tokens_per_second))} left"
        console.print("  ".join(part for part in (step, loss, speed, left) if part))

    yield report


def _conclude(outcome: Outcome, say: Callable[[str], None]) -> None:
    if outcome.stopped_by:
        planned = "" if outcome.planned_steps is None else f" of {outcome.planned_steps}"
        say(f"stopped by {outcome.stopped_by} after step {outcome.step}{planned}; --resume goes on from there")
    if outcome.held_out is not None:
        say(f"held-out loss: {outcome.held_out.bits_per_byte:.3f} bits per byte after {outcome.held_out.step} steps")
    say(f"checkpoint:    {outcome.checkpoint}")
    say(f"loss plot:     {outcome.plot}")
    say(f"metrics:       {outcome.metrics}")
