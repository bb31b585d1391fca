"""The command `lightning-attention` and its subcommands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import lightning_attention
from lightning_attention.cli.bench import bench
from lightning_attention.cli.check import check
from lightning_attention.cli.evaluate import evaluate
from lightning_attention.cli.export import export
from lightning_attention.cli.generate import generate
from lightning_attention.cli.streams import show_every_character
from lightning_attention.cli.tokenize import tokenize
from lightning_attention.cli.train import train
from lightning_attention.errors import DiskError, DivergedError, InputError, is_told_elsewhere

app = typer.Typer(
    help="Linear attention that trains and serves at constant speed per token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (check, bench, tokenize, train, evaluate, export, generate):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lightning-attention {lightning_attention.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(args: list[str] | None = None) -> None:
    """Run the command line; exit status 2 and one line on stderr when what the user gave cannot be used."""
    show_every_character()
    try:
        app(args=args)
    except InputError as error:
        if not is_told_elsewhere(error):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (DiskError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that cannot be written, a name that is too long
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        sys.exit(1)
