"""`lightning-attention generate`: continue prompts with a trained model, as a stream or from a file."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_attention.cli.prompts import MOST_SEED, MOST_TEMPERATURE, MOST_TOKENS, read_prompts
from lightning_attention.cli.train import memory_error
from lightning_attention.errors import InputError
from lightning_attention.training.config import check_text

if TYPE_CHECKING:
    from lightning_attention.serving.text import Piece


def generate(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Texts to continue, all at once; - is standard input, which is also read when it is a pipe and no "
            "PROMPT is given.",
            show_default=False,
        ),
    ] = None,
    *,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines instead, - for standard input: {"prompt": "...", "id": "...", "max_tokens": 50}; '
            "temperature, top_p and seed too. All but the prompt may be left out.",
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Prompts that run at a time; the others wait.")] = 256,
    model: Annotated[
        Path, typer.Option(metavar="FOLDER", help="A run, one of its checkpoints, or a Hugging Face folder.")
    ] = Path("runs/default"),
    max_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens to generate for each prompt, at most.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, max=MOST_TEMPERATURE, help="Divides the logits; 0 always takes the likeliest token.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the fewest tokens that hold this much probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="The same seed gives the same text.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of a document.")] = False,
    echo: Annotated[bool, typer.Option(help="Print each prompt before its continuation.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Continue prompts with a trained model, printing text as it comes.

    Memory does not grow with the length of a text: a TransNormer carries a state of fixed size. A Llama keeps keys and
    values of all tokens: each prompt that runs takes room for the longest prompt and what may come after it.

    Several prompts run as one batch; the first is printed as it comes, the others after it.

    With --prompts every prompt becomes a line of JSON when it has ended, in that order: its id (the line number where
    none is given), its text, how many tokens were generated, and whether it ended by itself (stop) or at --max-tokens
    (length). A prompt that ended makes room for the next.
    """
    if prompts is not None and texts:
        raise typer.BadParameter("give either PROMPT or --prompts", param_hint="--prompts")
    for option, value in {"--temperature": temperature, "--top-p": top_p}.items():
        if math.isnan(value):
            raise typer.BadParameter("nan is not a number", param_hint=option)
    openings = _texts(texts or []) if prompts is None else []
    from lightning_attention.serving.text import Generator, Prompt
    from lightning_attention.training.runtime import Runtime
    from lightning_attention.training.trained import open_trained

    like = Prompt("", max_tokens, temperature, top_p, seed, ignore_eos)
    if prompts is not None:
        ids, wanted = read_prompts(prompts, like)
    else:
        wanted = [replace(like, text=text, seed=seed + i) for i, text in enumerate(openings)]
    runtime = Runtime.choose(device, "float32")
    trained = open_trained(model)
    trained.model.to(runtime.device)
    generator = Generator(trained.served(wanted), trained.tokenizer)
    stream = generator.stream(wanted, max_batch=max_batch)
    try:
        if prompts is not None:
            _print_lines(stream, ids)
        else:
            _print_streams(stream, openings if echo else [""] * len(openings))
    except (MemoryError, RuntimeError) as error:
        raise memory_error(error, "--max-batch or --max-tokens") from error


def _texts(prompts: list[str]) -> list[str]:
    """The prompts, with standard input in place of -, or for no prompt when something is piped in."""
    if not prompts:
        prompts = [""] if sys.stdin.isatty() else ["-"]
    if "-" in prompts:
        try:
            piped = sys.stdin.read().removeprefix("\ufeff")  # a byte order mark
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from error
        prompts = [piped if prompt == "-" else prompt for prompt in prompts]
    return [check_text(f"prompt {number}", prompt) for number, prompt in enumerate(prompts, 1)]


def _print_streams(stream: Iterator[list[Piece]], openings: list[str]) -> None:
    """Print the first text as it comes, and the others, which wait in files meanwhile, after it."""
    out = sys.stdout
    many = len(openings) > 1
    with ExitStack() as stack:
        # A file only for what is long, so that a full folder for temporary files is in nobody's way.
        waiting = [
            stack.enter_context(tempfile.SpooledTemporaryFile(1 << 24, "w+", encoding="utf-8")) for _ in openings[1:]
        ]
        sinks = [out, *waiting]
        for number, (sink, opening) in enumerate(zip(sinks, openings, strict=True), 1):
            sink.write(f"=== {number} of {len(openings)} ===\n{opening}" if many else opening)
        out.flush()
        for pieces in stream:
            for piece in pieces:
                sinks[piece.prompt].write(piece.text)
            out.flush()
        out.write("\n")
        for file in waiting:
            file.seek(0)
            shutil.copyfileobj(file, out)
            out.write("\n")


def _print_lines(stream: Iterator[list[Piece]], ids: list[str | int]) -> None:
    """Print every prompt's text as a line of JSON when it has ended, and the speed, to standard error, at the end."""
    running: dict[int, list[str]] = {}
    tokens, start = 0, time.perf_counter()
    escape = (sys.stdout.encoding or "").lower() != "utf-8"
    for pieces in stream:
        tokens += len(pieces)
        for prompt, text, finished in pieces:
            running.setdefault(prompt, []).append(text)
            if finished:
                texts = running.pop(prompt)
                line = {"id": ids[prompt], "text": "".join(texts), "tokens": len(texts), "finish_reason": finished}
                print(json.dumps(line, ensure_ascii=escape), flush=True)
    seconds = time.perf_counter() - start
    print(f"{len(ids)} prompts, {tokens} tokens, {seconds:.1f} s, {tokens / seconds:.0f} tokens/s", file=sys.stderr)
