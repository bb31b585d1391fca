"""`lightning-attention export`: a trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run for its newest.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or an empty folder.", show_default=False)],
) -> None:
    """Make a Hugging Face folder of a training checkpoint: configuration, weights, tokenizer, generation settings.

    The folder appears whole or not at all. transformers loads it, as `lightning-attention generate` and `evaluate` do.
    """
    from lightning_attention.training import trained

    exported = trained.export(checkpoint, folder)
    weights = sum(p.numel() for p in exported.model.parameters())
    typer.echo(f"{folder}: {exported.model.config.model_type}, {weights / 1e6:.2f} M weights, of {exported.folder}")
