"""`lightning-attention tokenize`: texts of any size into a folder of tokens for `train`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO, Annotated, cast

import typer

from lightning_attention.cli.streams import LastingStream
from lightning_attention.errors import DiskError, InputError
from lightning_attention.training.config import make_config

DEFAULT_VOCAB_SIZE = 32_768


def tokenize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Files, folders or globs of text, JSON lines or parquet, plain or compressed (.gz, .bz2, .xz, .zst), "
            "or folders of Hugging Face data sets; - reads standard input.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(help="The folder to write; it must not exist yet.", metavar="FOLDER")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer.json or a folder with one, as of a Hugging Face model or a checkpoint. Without it a "
            "byte-level BPE is trained on a sample of the text.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help=f"Size of the vocabulary of that BPE; not with --tokenizer. [default: {DEFAULT_VOCAB_SIZE}]",
            show_default=False,
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of JSON lines, and the column of tables, that holds the text.")
    ] = "text",
    encoding: Annotated[
        str, typer.Option(help="Encoding of the text: auto detects each file's own, reading it once more.")
    ] = "auto",
    val_fraction: Annotated[float, typer.Option(help="Share of the documents that is held out for validation.")] = 0.01,
) -> None:
    """Turn texts of any size into a folder of tokens, which `train FOLDER` reads in place.

    Memory does not grow with the texts. The folder appears whole or not at all. Which documents are held out depends
    on their text alone: the same one is never on both sides.
    """
    # What is wrong is said before transformers is loaded.
    if tokenizer is not None and vocab_size is not None:
        raise InputError(f"--vocab-size is {vocab_size}, but the vocabulary is that of --tokenizer; give one of them")
    config = make_config(
        {
            "inputs": inputs,
            "vocab_size": vocab_size or DEFAULT_VOCAB_SIZE,
            "text_field": text_field,
            "encoding": encoding,
            "val_fraction": val_fraction,
        }
    )
    from rich.console import Console

    from lightning_attention.training.tokenization import tokenize_texts

    console = Console(file=cast("IO[str]", LastingStream(sys.stderr)), highlight=False, soft_wrap=True, markup=False)
    began = time.perf_counter()
    with console.status("reading the text") as status:

        def progress(tokens: int) -> None:
            status.update(f"{tokens:,} tokens, {tokens / (time.perf_counter() - began):,.0f} a second")

        try:
            about = tokenize_texts(
                config, Path(out), None if tokenizer is None else Path(tokenizer), console.print, progress
            )
        except DiskError as error:
            print(f"error: {error}; nothing was kept", file=sys.stderr)
            raise typer.Exit(1) from error
    for name, part in (("to train on", about["train"]), ("held out", about["val"])):
        print(
            f"{name + ':':12} {part['tokens']:,} tokens of {part['documents']:,} documents, {part['bytes']:,} bytes, "
            f"in {len(part['shards']):,} files"
        )
    print(f"vocabulary:  {about['vocab_size']:,}, {about['dtype']}")
    print(f"folder:      {out}")
