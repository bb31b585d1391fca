"""A run small enough for a test: a made-up text, a model of some thousand weights, a step in a few milliseconds."""

import random
from pathlib import Path
from typing import Any

from lightning_attention.training.config import make_config
from lightning_attention.training.trainer import Outcome, Trainer


def write_text(path: Path, words: int = 1500) -> Path:
    """Sentences over a small vocabulary, characters of 1 to 4 bytes among them."""
    draw = random.Random(0)
    vocabulary = ["lightning", "attention", "naïve", "state", "decay", "漢字", "block", "🙂", "the", "of", "a"]
    lines = [" ".join(draw.choices(vocabulary, k=12)) + ".\n" for _ in range(words // 12)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def tiny_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run in `folder/run` on a text in `folder`."""
    text = folder / "text.txt"
    return {
        "inputs": [str(text if text.exists() else write_text(text))],
        "out": str(folder / "run"),
        "vocab_size": 300,
        "seq_len": 24,
        "layers": 2,
        "width": 32,
        "heads": 2,
        "glu_dim": 32,
        "batch_size": 2,
        "steps": 6,
        "warmup_steps": 2,
        "lr": 1e-2,
        "device": "cpu",
        "log_every": 1,
        "eval_every": 3,
        "save_every": 2,
        **changes,
    }


def train(settings: dict[str, Any], **how: Any) -> tuple[Trainer, Outcome]:
    """Run to the end."""
    trainer = Trainer(make_config(settings), **how)
    return trainer, trainer.fit()
