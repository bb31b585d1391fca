"""`lightning-attention generate`: continue prompts with a trained model, as a stream."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Texts to continue, all at once; - is standard input, which is also read when it is a pipe and no "
            "PROMPT is given.",
            show_default=False,
        ),
    ] = None,
    *,
    model: Annotated[
        Path, typer.Option(metavar="FOLDER", help="A run, one of its checkpoints, or a Hugging Face folder.")
    ] = Path("runs/default"),
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt, at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="Divides the logits; 0 always takes the likeliest token.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the fewest tokens that hold this much probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of a document.")] = False,
    echo: Annotated[bool, typer.Option(help="Print each prompt before its continuation.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Continue prompts with a trained TransNormer, printing text as it comes.

    Memory does not grow with the length: the model carries a state of fixed size. Several prompts run as one batch;
    the first is printed as it comes, the others after it.
    """
    texts = _texts(prompts or [])
    from lightning_attention.training.checkpoint import find_model
    from lightning_attention.training.generation import Generator
    from lightning_attention.training.runtime import Runtime

    runtime = Runtime.choose(device, "float32")
    generator = Generator.load(find_model(model), runtime.device)
    stream = generator.stream(
        texts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    _print_streams(stream, texts if echo else [""] * len(texts))


def _texts(prompts: list[str]) -> list[str]:
    """The prompts, with standard input in place of -, or for no prompt when something is piped in."""
    if not prompts:
        prompts = [""] if sys.stdin.isatty() else ["-"]
    if "-" in prompts:
        piped = sys.stdin.read()
        prompts = [piped if prompt == "-" else prompt for prompt in prompts]
    return prompts


def _print_streams(stream: Iterator[list[str]], openings: list[str]) -> None:
    """Print the first text as it comes, and the others, which wait in files meanwhile, after it."""
    out = sys.stdout
    many = len(openings) > 1
    with ExitStack() as stack:
        waiting = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in openings[1:]]
        sinks = [out, *waiting]
        for number, (sink, opening) in enumerate(zip(sinks, openings, strict=True), 1):
            sink.write(f"=== {number} of {len(openings)} ===\n{opening}" if many else opening)
        out.flush()
        for texts in stream:
            for sink, text in zip(sinks, texts, strict=True):
                sink.write(text)
            out.flush()
        out.write("\n")
        for file in waiting:
            file.seek(0)
            shutil.copyfileobj(file, out)
            out.write("\n")
