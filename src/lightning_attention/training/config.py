"""Every setting of a training run, with its default and its help, in one place.

The command line's options and the keys of a TOML file are both read off `TrainConfig`.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lightning_attention.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Larger sizes are slips of the keyboard, and would take all of the memory before anything could be said.
MOST = 1 << 20
MOST_STEPS = 99_999_999  # the name of a checkpoint has eight digits
MOST_MINUTES = 10_000_000
CORPORA = ("pydoc", "stdlib")
PRECISIONS = ("auto", "bf16", "float32")
# Settings that may differ between a run and its continuation: none of them touches what is computed in a step,
# apart from `steps`, which moves the end of the schedule because somebody asked for that.
CHANGEABLE_ON_RESUME = frozenset({"out", "steps", "log_every", "eval_every", "save_every", "keep", "device", "compile"})
DEFAULT_STEPS = 1000
DEFAULT_VAL_FRACTION = 0.1


def _setting(default: Any, group: str, help: str) -> Any:
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Raises InputError when a value is out of range."""

    inputs: tuple[str, ...] = _setting((), "Data", "Text files, folders or globs to train on; - reads standard input.")
    corpus: str = _setting("pydoc", "Data", "Built-in text when no INPUT is given: pydoc (English) or stdlib (Python).")
    encoding: str = _setting("auto", "Data", "Encoding of the text: auto detects each file's own; cp1251, utf-16, ...")
    text_field: str = _setting("text", "Data", "Where the text is in the objects of .jsonl files.")
    val_fraction: float | None = _setting(
        None,
        "Data",
        f"Share of the text held out for validation, in blocks all over it. [default: {DEFAULT_VAL_FRACTION}]",
    )
    validation: str | None = _setting(
        None, "Data", "Validate on this file, folder or glob instead; what it holds is left out of the training text."
    )
    # The defaults of data, model and optimisation are for the 0.4 MB of pydoc and two minutes on two CPU cores.
    # Bits per byte of the last tenth of that text: 2.08 after 131 steps, 1.92 after 221, 1.77 after 440 (3.9 epochs,
    # 200 s of one thread's time). A run of 1,320 steps is at its best after 880 (7.8 epochs) and ends at 1.88. A
    # vocabulary of 1,024 with half the learning rate came to 1.78 after 440.
    vocab_size: int = _setting(2048, "Data", "Size of the byte-level BPE vocabulary; 258 is plain bytes.")
    seq_len: int = _setting(256, "Data", "Tokens in one training window.")

    layers: int = _setting(3, "Model", "Number of layers.")
    width: int = _setting(256, "Model", "Width of the model.")
    heads: int = _setting(4, "Model", "Attention heads; must divide the width.")
    glu_dim: int | None = _setting(None, "Model", "Inner width of the gated linear unit. [default: 2.75 x width]")

    tie_embeddings: bool = _setting(True, "Model", "Use one matrix for the embedding and the output head.")

    steps: int | None = _setting(None, "Optimisation", f"Optimizer steps. [default: {DEFAULT_STEPS}]")
    max_minutes: float | None = _setting(
        None,
        "Optimisation",
        "Fit the number of steps to this time. The schedule then follows the clock, so that no two runs are the same.",
    )
    max_epochs: float | None = _setting(
        None, "Optimisation", "Never plan more steps than this many passes over the training text."
    )
    batch_size: int = _setting(4, "Optimisation", "Windows in one forward pass.")
    accumulate: int = _setting(1, "Optimisation", "Forward passes whose gradients make one step.")
    lr: float = _setting(6e-3, "Optimisation", "Peak learning rate.")
    final_lr: float = _setting(0.05, "Optimisation", "Learning rate at the end of the cosine, as a share of the peak.")
    warmup_steps: int = _setting(30, "Optimisation", "Steps of linear warm-up.")
    weight_decay: float = _setting(0.3, "Optimisation", "AdamW weight decay on matrices.")
    beta1: float = _setting(0.9, "Optimisation", "AdamW beta 1.")
    beta2: float = _setting(0.98, "Optimisation", "AdamW beta 2.")
    clip: float = _setting(1.0, "Optimisation", "Largest gradient norm; 0 turns clipping off.")

    out: str = _setting("runs/default", "Run", "Folder for checkpoints, metrics.jsonl and loss.png.")
    seed: int = _setting(0, "Run", "Seeds the weights and the order of the windows.")
    device: str = _setting("auto", "Run", "auto, cpu, cuda, cuda:1, ...")
    precision: str = _setting("auto", "Run", "auto, bf16 or float32; auto is bf16 where a GPU has it.")
    compile: bool = _setting(False, "Run", "Run the model through torch.compile.")
    log_every: int = _setting(10, "Run", "Steps between lines of metrics.jsonl.")
    eval_every: int = _setting(100, "Run", "Steps between validations; 0 validates at the end only.")
    eval_tokens: int = _setting(200_000, "Run", "Validate on at most this many tokens of the held-out text; 0 is all.")
    save_every: int = _setting(200, "Run", "Steps between checkpoints; 0 saves at the end only.")
    keep: int = _setting(2, "Run", "Checkpoints to keep.")

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("seq_len", "layers", "width", "heads", "batch_size", "accumulate", "log_every", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "eval_every", "eval_tokens", "save_every", "weight_decay", "clip", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("steps", "glu_dim"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        self._require("seq_len", self.seq_len >= 2, "at least 2 tokens, one to read and one to predict")
        self._require("steps", (self.steps or 0) <= MOST_STEPS, f"at most {MOST_STEPS:,}")
        # An empty path is the current folder: what a script's unset variable must not stand for.
        self._require("inputs", "" not in self.inputs, "names of files or folders, none of them empty")
        for name in ("out", "validation"):
            self._require(name, getattr(self, name) != "", "the name of a file or folder, not empty")
        self._require("corpus", self.corpus in CORPORA, f"one of {', '.join(CORPORA)}")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._require("encoding", _is_text_encoding(self.encoding), "auto or the name of a text encoding, as cp1251")
        if self.val_fraction is not None:
            self._require("val_fraction", 0 < self.val_fraction < 1, "between 0 and 1")
            self._require("val_fraction", self.validation is None, "left out when validation is given")
        self._require("vocab_size", self.vocab_size >= 258, "at least 258: 256 bytes and 2 special tokens")
        self._require("width", self.width % self.heads == 0, f"a multiple of heads ({self.heads})")
        for name in ("vocab_size", "layers", "width", "glu_dim"):
            self._require(name, (getattr(self, name) or 0) <= MOST, f"at most {MOST:,}")
        self._require("batch_size", self.tokens_per_step < 1 << 31, "smaller: a step would read 2^31 tokens or more")
        self._require("seed", self.seed < 1 << 63, "below 2^63")
        self._require("lr", self.lr > 0, "above 0")
        self._require("final_lr", 0 <= self.final_lr <= 1, "between 0 and 1")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("max_epochs", self.max_epochs is None or self.max_epochs > 0, "above 0")
        if self.max_minutes is not None:
            self._require("max_minutes", 0 < self.max_minutes <= MOST_MINUTES, f"above 0, at most {MOST_MINUTES:,}")
            self._require("steps", self.steps is None, "left out when max_minutes is given")
            self._require("warmup_steps", self.warmup_steps >= 5, "at least 5 when max_minutes is given, to time them")

        for name, kind in _TYPES.items():
            if kind.startswith("float") and getattr(self, name) is not None:
                self._require(name, math.isfinite(getattr(self, name)), "a finite number")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {wanted}; got {getattr(self, name)!r}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.accumulate * self.seq_len

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {**asdict(self), "inputs": list(self.inputs)}

    def as_toml(self) -> str:
        """The same settings as a file for `--config`."""
        # TOML has JSON's escapes, but for its halves of characters, and wants one for DEL.
        values = {
            name: json.dumps(value, ensure_ascii=False) for name, value in self.as_dict().items() if value is not None
        }
        return "".join(f"{name} = {value}\n" for name, value in values.items()).replace("\x7f", "\\u007f")


def make_config(settings: dict[str, Any]) -> TrainConfig:
    """A TrainConfig from names and values. Raises InputError for an unknown name, a wrong type or a bad value."""
    return TrainConfig(**{name: _checked(name, value) for name, value in settings.items()})


def resumed_config(stored: dict[str, Any], asked: dict[str, Any]) -> TrainConfig:
    """The stored settings with those asked for now. Raises InputError where they contradict each other."""
    config = make_config(stored)
    changes = {}
    for name, value in asked.items():
        value = _checked(name, value)
        if value == getattr(config, name):
            continue
        if name not in CHANGEABLE_ON_RESUME:
            raise InputError(
                f"{name} is {getattr(config, name)!r} in the checkpoint and {value!r} now; a resumed run keeps it"
            )
        changes[name] = value
    if changes.get("steps") is not None and config.max_minutes is not None:
        raise InputError("steps cannot be set when resuming a run that was started with max_minutes")
    return replace(config, **changes)


def read_toml(path: str) -> dict[str, Any]:
    """The settings in a TOML file. Raises InputError when it cannot be read or names an unknown setting."""
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration {path}: {_reason(error)}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    for name, value in settings.items():
        try:
            _checked(name, value)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return settings


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _is_text_encoding(name: str) -> bool:
    try:
        return name == "auto" or (codecs.lookup(name) is not None and isinstance(b"a".decode(name, "replace"), str))
    except (LookupError, ValueError):  # not known, bytes to bytes as base64 is, or no name at all
        return False


_TYPES: dict[str, Any] = {f.name: f.type for f in fields(TrainConfig)}


def _checked(name: str, value: Any) -> Any:
    if name not in _TYPES:
        close = difflib.get_close_matches(name.replace("-", "_"), _TYPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; the settings are {', '.join(_TYPES)}"
        raise InputError(f"unknown setting {name!r}{hint}")
    kind = _TYPES[name]
    if kind.startswith("tuple"):
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(check_text(name, item) for item in value)
        raise InputError(f"{name} must be a list of strings; got {value!r}")
    kind, _, optional = kind.partition(" | ")
    if value is None and optional:
        return None
    if kind == "float" and type(value) is int:
        return float(value) if abs(value) < 1 << 63 else math.inf  # which is refused later
    if type(value).__name__ != kind:
        raise InputError(f"{name} must be of type {kind}; got {value!r}")
    return check_text(name, value) if kind == "str" else value


def check_text(name: str, value: str) -> str:
    """The text itself. Raises InputError when it cannot be written as UTF-8 or holds a zero character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        place = f"{value[error.start]!r} at character {error.start}"
        raise InputError(f"{name} is not Unicode text: {place}; was it typed or stored as UTF-8?") from error
    if "\0" in value:
        raise InputError(f"{name} must hold no zero character; got {value!r}")
    return value
