"""Prompts as JSON lines: one object a line, its settings checked, the command's in place of those left out."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_attention.errors import InputError

if TYPE_CHECKING:
    from lightning_attention.serving.text import Prompt


MOST_TOKENS = (1 << 31) - 1
MOST_SEED = (1 << 63) - 1
MOST_TEMPERATURE = 1e6


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _text(value: Any) -> bool:
    """Whether it is a string that can be written: JSON's escapes can spell halves of characters."""
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode()


#: What a line may hold: whether a value will do, and in words.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_text, "a string, in Unicode"),
    "id": (lambda x: _text(x) or _whole(x), "a string or a whole number, in Unicode"),
    "max_tokens": (lambda x: _whole(x) and 1 <= x <= MOST_TOKENS, "a whole number, 1 or more, below 2^31"),
    "temperature": (
        lambda x: _number(x) and 0 <= x <= MOST_TEMPERATURE,
        f"a number, 0 or more, at most {MOST_TEMPERATURE:,.0f}",
    ),
    "top_p": (lambda x: _number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "seed": (lambda x: _whole(x) and 0 <= x <= MOST_SEED, "a whole number, 0 or more, below 2^63"),
}


def read_prompts(path: str, defaults: Prompt) -> tuple[list[str | int], list[Prompt]]:
    """The ids and prompts of a file of JSON lines; ``-`` is standard input, and blank lines are skipped.

    A prompt without an id gets its line number, one without a seed that of ``defaults`` plus the prompts before it.

    Raises:
        InputError: the file cannot be read, has no prompt, or has a bad line: which, what came, what is wanted.
    """
    name = "standard input" if path == "-" else path
    try:
        with nullcontext(sys.stdin) if path == "-" else Path(path).open(encoding="utf-8") as lines:
            return _parse(lines, name, defaults)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts in {name}: {getattr(error, 'strerror', None) or error}") from error


def _parse(lines: Iterable[str], name: str, defaults: Prompt) -> tuple[list[str | int], list[Prompt]]:
    ids: dict[str | int, int] = {}
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix("\ufeff")  # a byte order mark
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        settings = _checked(line, where)
        identity = settings.pop("id", number)
        if identity in ids:
            raise InputError(f"{where}: id is {_shown(identity)}, as in line {ids[identity]}; each must be another")
        ids[identity] = number
        text = settings.pop("prompt")
        prompts.append(replace(defaults, **{"text": text, "seed": defaults.seed + len(prompts), **settings}))
    if not prompts:
        raise InputError(f'{name} has no prompts; a line is like {{"prompt": "Once upon a time"}}')
    return [*ids], prompts


def _checked(line: str, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{where} is not JSON: {error}; wanted is {{"prompt": "..."}}') from error
    if not isinstance(settings, dict):
        raise InputError(f'{where} is {_shown(settings)}; wanted is an object, {{"prompt": "..."}}')
    for field, value in settings.items():
        if field not in FIELDS:
            raise InputError(f"{where}: there is no field {_shown(field)}; the fields are {', '.join(FIELDS)}")
        will_do, wanted = FIELDS[field]
        if not will_do(value):
            raise InputError(f"{where}: {field} is {_shown(value)}; it must be {wanted}")
    if "prompt" not in settings:
        raise InputError(f"{where}: prompt is missing; it must be a string")
    return settings


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."
