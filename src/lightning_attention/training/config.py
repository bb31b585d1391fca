"""Every setting of a training run, with its default, its help and what it may be, in one place.

The command line's options and the keys of a TOML file are both read off `TrainConfig`.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_attention.errors import InputError
from lightning_attention.models.presets import MODELS, SIZES, find_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Settings that may differ between a run and its continuation: none of them touches what is computed in a step,
# apart from `steps`, which moves the end of the schedule because somebody asked for that.
CHANGEABLE_ON_RESUME = frozenset(
    {"out", "steps", "log_every", "eval_every", "save_every", "keep", "device", "compile", "activation_checkpointing"}
    | {"tracker", "sample_every", "sample_prompt"}
)
# How the processes of a launch share the work: no matter of the run, so a checkpoint's does not bind.
OF_THE_LAUNCH = ("dp_replicate", "dp_shard", "sp")
DEFAULT_STEPS = 1000
DEFAULT_VAL_FRACTION = 0.1
# Settings that `size` stands for, as they are without it.
SHAPE = {"layers": 3, "width": 256, "heads": 4, "glu_dim": None, "tie_embeddings": True}
DEFAULT_DECAY_FRACTION = 0.2

Rule = tuple[str, Callable[[Any], bool]]  # what is wanted, in words, and whether a value is that


def _is_text_encoding(name: str) -> bool:
    try:
        return name == "auto" or (codecs.lookup(name) is not None and isinstance(b"a".decode(name, "replace"), str))
    except (LookupError, ValueError):  # not known, bytes to bytes as base64 is, or no name at all
        return False


def _one_of(*choices: str) -> Rule:
    return f"one of {', '.join(choices)}", lambda value: value in choices


AT_LEAST_1: Rule = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE: Rule = ("0 or more", lambda value: value >= 0)
ABOVE_0: Rule = ("above 0", lambda value: value > 0)
COEFFICIENT: Rule = ("in [0, 1)", lambda value: 0 <= value < 1)
# Larger sizes are slips of the keyboard, and would take all of the memory before anything could be said.
NOT_HUGE: Rule = ("at most 1,048,576", lambda value: value <= 1 << 20)
A_SIZE: Rule = (f"one of {', '.join(SIZES)}", lambda value: value.upper() in SIZES)
A_WINDOW: Rule = ("at least 2 tokens, one to read and one to predict", lambda value: value >= 2)
PART: Rule = ("between 0 and 1", lambda value: 0 < value < 1)
SOME_OR_ALL: Rule = ("above 0, at most 1", lambda value: 0 < value <= 1)
SHARE: Rule = ("between 0 and 1", lambda value: 0 <= value <= 1)
EIGHT_DIGITS: Rule = ("at most 99,999,999", lambda value: value < 10**8)  # as many as the name of a checkpoint has
SHARDS: Rule = ("at least 1, or -1", lambda value: value >= 1 or value == -1)
CHECKPOINTING: Rule = (
    "none, block or a number, at least 1",
    lambda value: value in ("none", "block") or (value.isdecimal() and int(value) >= 1),
)
MINUTES: Rule = ("above 0, at most 10,000,000", lambda value: 0 < value <= 10_000_000)
INT64: Rule = ("below 2^63", lambda value: value < 1 << 63)
ENCODING: Rule = ("auto or the name of a text encoding, as cp1251", _is_text_encoding)
# An empty path is the current folder, which a script's unset variable must not stand for.
NAME: Rule = ("the name of a file or folder, not empty", lambda value: value != "")
NAMES: Rule = ("names of files or folders, none of them empty", lambda values: "" not in values)


def _setting(group: str, default: Any, help: str, *rules: Rule) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "rules": rules})


_data, _model, _optimisation, _parallelism, _run = (
    partial(_setting, group) for group in ("Data", "Model", "Optimisation", "Parallelism", "Run")
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Raises InputError when a value has the wrong type, is out of range, or contradicts another."""

    inputs: tuple[str, ...] = _data(
        (), "Text files, folders or globs to train on, or one folder of tokens; - reads standard input.", NAMES
    )
    corpus: str = _data(
        "pydoc", "Built-in text when no INPUT is given: pydoc (English) or stdlib (Python).", _one_of("pydoc", "stdlib")
    )
    encoding: str = _data("auto", "Encoding of the text: auto detects each file's own; cp1251, utf-16, ...", ENCODING)
    text_field: str = _data("text", "The field of JSON lines, and the column of tables, that holds the text.")
    val_fraction: float | None = _data(
        None,
        f"Share of the text held out for validation, in blocks all over it. [default: {DEFAULT_VAL_FRACTION}]",
        PART,
    )
    validation: str | None = _data(
        None, "Validate on this file, folder or glob instead; what it holds is left out of the training text.", NAME
    )
    # The defaults of data, model and optimisation are for the 0.4 MB of pydoc and two minutes on two CPU cores.
    # Bits per byte of the last tenth of that text: 2.08 after 131 steps, 1.92 after 221, 1.77 after 440 (3.9 epochs,
    # 200 s of one thread's time). A run of 1,320 steps is at its best after 880 (7.8 epochs) and ends at 1.88. A
    # vocabulary of 1,024 with half the learning rate came to 1.78 after 440.
    vocab_size: int = _data(2048, "Size of the byte-level BPE vocabulary; 258 is plain bytes.", AT_LEAST_1, NOT_HUGE)
    documents: str = _data(
        "separate",
        "separate: no document sees another in a window; joined: each sees those before it.",
        _one_of("separate", "joined"),
    )
    seq_len: int = _data(256, "Tokens in one training window.", A_WINDOW)

    model: str = _model(
        "transnormer",
        "transnormer, or llama: transformers' own, with softmax attention, to compare with.",
        _one_of(*MODELS),
    )
    size: str | None = _model(
        None, f"A size of the papers in place of the five settings below: {', '.join(SIZES)}.", A_SIZE
    )
    layers: int = _model(None, "Number of layers. [default: 3]", AT_LEAST_1, NOT_HUGE)
    width: int = _model(None, "Width of the model. [default: 256]", AT_LEAST_1, NOT_HUGE)
    heads: int = _model(None, "Attention heads; must divide the width. [default: 4]", AT_LEAST_1)
    glu_dim: int | None = _model(
        None,
        "Inner width of the gated linear unit. [default: 2.75 x width, or for llama as many weights]",
        AT_LEAST_1,
        NOT_HUGE,
    )
    tie_embeddings: bool = _model(None, "Use one matrix for the embedding and the output head. [default: yes]")

    steps: int | None = _optimisation(None, f"Optimizer steps. [default: {DEFAULT_STEPS}]", AT_LEAST_1, EIGHT_DIGITS)
    max_minutes: float | None = _optimisation(
        None,
        "Fit the number of steps to this time. The schedule then follows the clock, so that no two runs are the same.",
        MINUTES,
    )
    max_epochs: float | None = _optimisation(
        None, "Never plan more steps than this many passes over the training text.", ABOVE_0
    )
    batch_size: int = _optimisation(4, "Windows in one forward pass of a process, at most.", AT_LEAST_1)
    accumulate: int = _optimisation(
        1,
        "Forward passes whose gradients make one step, over all processes: a step reads batch_size x accumulate "
        "windows, however many there are.",
        AT_LEAST_1,
    )
    lr: float = _optimisation(6e-3, "Peak learning rate.", ABOVE_0)
    schedule: str = _optimisation(
        "cosine",
        "The learning rate after the warm-up: cosine falls up to the last step; wsd stays at the peak, then falls in a "
        "line over the last steps (--decay-fraction).",
        _one_of("cosine", "wsd"),
    )
    decay_fraction: float | None = _optimisation(
        None,
        f"Share of all steps over which wsd lowers the learning rate. [default: {DEFAULT_DECAY_FRACTION}]",
        SOME_OR_ALL,
    )
    final_lr: float = _optimisation(0.05, "Learning rate at the last step, as a share of the peak.", SHARE)
    warmup_steps: int = _optimisation(30, "Steps of linear warm-up.", NOT_NEGATIVE)
    weight_decay: float = _optimisation(0.3, "AdamW weight decay on matrices.", NOT_NEGATIVE)
    beta1: float = _optimisation(0.9, "AdamW beta 1.", COEFFICIENT)
    beta2: float = _optimisation(0.98, "AdamW beta 2.", COEFFICIENT)
    clip: float = _optimisation(1.0, "Largest gradient norm; 0 turns clipping off.", NOT_NEGATIVE)

    dp_replicate: int = _parallelism(1, "Copies of the weights, each sharded over processes of its own.", AT_LEAST_1)
    dp_shard: int = _parallelism(
        -1, "Data-parallel processes that share one copy of the weights; -1 is all that are left.", SHARDS
    )
    sp: int = _parallelism(1, "Processes that share one window, a slice each; must divide seq_len.", AT_LEAST_1)
    activation_checkpointing: str = _parallelism(
        "none",
        "Compute activations anew in the backward pass: none, block (of every block) or N (of every N-th).",
        CHECKPOINTING,
    )
    compile: bool = _parallelism(False, "Run each block through torch.compile.")

    out: str = _run("runs/default", "Folder for checkpoints, metrics.jsonl and loss.png.", NAME)
    seed: int = _run(0, "Seeds the weights and the order of the windows.", NOT_NEGATIVE, INT64)
    device: str = _run("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = _run(
        "auto", "auto, bf16 or float32; auto is bf16 where a GPU has it.", _one_of("auto", "bf16", "float32")
    )
    log_every: int = _run(10, "Steps between lines of metrics.jsonl.", AT_LEAST_1)
    eval_every: int = _run(
        100,
        "Steps between validations; with 0 there is one before the first step and one at the end.",
        NOT_NEGATIVE,
    )
    eval_tokens: int = _run(
        200_000, "Validate on at most this many tokens of the held-out text; 0 is all.", NOT_NEGATIVE
    )
    save_every: int = _run(200, "Steps between checkpoints; 0 saves at the end only.", NOT_NEGATIVE)
    keep: int = _run(2, "Checkpoints to keep.", AT_LEAST_1)
    tracker: str = _run(
        "none",
        "Show metrics.jsonl elsewhere too, with a package to be installed: none, tensorboard, trackio or wandb.",
        _one_of("none", "tensorboard", "trackio", "wandb"),
    )
    sample_every: int = _run(
        0, "Steps between samples of generated text, in samples.jsonl; also after the last. 0: none.", NOT_NEGATIVE
    )
    sample_prompt: str = _run("", "What samples go on from; an empty text begins a document.")

    given = tuple[str, ...]()  # the settings that somebody asked for, by name: `make_config` notes them. No field.

    def __post_init__(self) -> None:
        """Check every value, then those that depend on each other."""
        for name in _SETTINGS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        self._settle_shape()
        timed = self.max_minutes is not None
        for name, refused, wanted in (
            ("width", self.width % self.heads, f"a multiple of heads ({self.heads})"),
            ("batch_size", self.tokens_per_step >= 1 << 31, "smaller: a step would read 2^31 tokens or more"),
            ("sp", self.seq_len % self.sp, f"a divisor of seq_len ({self.seq_len})"),
            ("val_fraction", self.validation and self.val_fraction, "left out when validation is given"),
            ("decay_fraction", self.schedule != "wsd" and self.decay_fraction, "left out unless schedule is wsd"),
            ("steps", timed and self.steps, "left out when max_minutes is given"),
            ("warmup_steps", timed and self.warmup_steps < 5, "at least 5 when max_minutes is given, to time them"),
        ):
            if refused:
                raise _refusal(name, getattr(self, name), wanted)

    def _settle_shape(self) -> None:
        """Fill in the shape of the model, from `size` where it is given."""
        shape = SHAPE
        if self.size is not None:
            object.__setattr__(self, "size", self.size.upper())
            size = find_size(self.size)
            shape = {**{name: getattr(size, name) for name in SHAPE}, "glu_dim": size.glu(self.model)}
        for name, value in shape.items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, value)
            elif self.size is not None and given != value:
                raise _refusal(name, given, f"left out when size is {self.size}, which has {value}")

    @property
    def windows_per_step(self) -> int:
        """Windows that one optimizer step reads, over all processes."""
        return self.batch_size * self.accumulate

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads, over all processes."""
        return self.windows_per_step * self.seq_len

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint. What the size stands for is left to it, so that another fits in its place."""
        by_size = dict.fromkeys(SHAPE) if self.size is not None else {}
        return {**asdict(self), "inputs": list(self.inputs), **by_size}

    def as_toml(self) -> str:
        """The same settings as a file for `--config`."""
        # TOML has JSON's escapes, but for its halves of characters, and wants one for DEL.
        values = {
            name: json.dumps(value, ensure_ascii=False) for name, value in self.as_dict().items() if value is not None
        }
        return "".join(f"{name} = {value}\n" for name, value in values.items()).replace("\x7f", "\\u007f")


_SETTINGS = {setting.name: setting for setting in fields(TrainConfig)}


def make_config(settings: dict[str, Any]) -> TrainConfig:
    """A TrainConfig from names and values. Raises InputError for an unknown name or a bad value."""
    for name in settings:
        _refuse_unknown(name)
    config = TrainConfig(**settings)
    object.__setattr__(config, "given", tuple(settings))
    return config


def resumed_config(stored: dict[str, Any], asked: TrainConfig) -> TrainConfig:
    """The stored settings with those asked for now. Raises InputError where they contradict each other."""
    config = make_config({**stored, **{name: getattr(asked, name) for name in OF_THE_LAUNCH}})
    changes = {name: getattr(asked, name) for name in asked.given if getattr(asked, name) != getattr(config, name)}
    for name, value in changes.items():
        if name not in CHANGEABLE_ON_RESUME:
            raise InputError(
                f"{name} is {getattr(config, name)!r} in the checkpoint and {value!r} now; a resumed run keeps it"
            )
    if changes.get("steps") is not None and config.max_minutes is not None:
        raise InputError("steps cannot be set when resuming a run that was started with max_minutes")
    return replace(config, **changes)


def read_toml(path: str) -> dict[str, Any]:
    """The settings in a TOML file. Raises InputError when it cannot be read or holds a setting that cannot be used."""
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        for name, value in settings.items():
            _refuse_unknown(name)
            _checked(name, value)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the configuration {path}: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return settings


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


def _refuse_unknown(name: str) -> None:
    if name not in _SETTINGS:
        close = difflib.get_close_matches(name.replace("-", "_"), _SETTINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(_SETTINGS)}"
        raise InputError(f"unknown setting {name!r}; {hint}")


def _refusal(name: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{name} must be {wanted}; got {value!r}")


def _checked(name: str, value: Any) -> Any:
    """The value of a setting: lists become tuples, and whole numbers are accepted for floats."""
    kind = str(_SETTINGS[name].type).partition(" | ")[0]
    if value is None and _SETTINGS[name].default is None:
        return None
    if kind.startswith("tuple"):
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise _refusal(name, value, "a list of strings")
        value = tuple(check_text(name, item) for item in value)
    elif kind == "float" and type(value) is int:
        value = float(value) if abs(value) < 1 << 63 else math.inf  # which is refused below
    elif type(value).__name__ != kind:
        raise _refusal(name, value, f"of type {kind}")
    elif kind == "str":
        check_text(name, value)
    for wanted, holds in _SETTINGS[name].metadata["rules"]:
        if not holds(value):
            raise _refusal(name, value, wanted)
    if kind == "float" and not math.isfinite(value):
        raise _refusal(name, value, "a finite number")
    return value
