"""A request: a prompt to continue, and how; checked when it is made."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from lightning_attention.ops.validation import integer

#: What a torch.Generator takes as a seed.
_SEEDS = (-(1 << 63), (1 << 64) - 1)


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Everything is checked, and the token ids are copied, when the request is made, so that a fault is found before it
    shares a batch with others. Whether the model knows the ids is checked when it is submitted.

    Args:
        prompt: token ids, one at least, in a sequence, tensor or array of one dimension; kept as a tuple.
        max_tokens: tokens to generate, at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample from the fewest tokens that hold this much probability.
        seed: of the request's own random numbers, which do not depend on other requests. A 64-bit integer.
        stop: token ids that end the request; the one that does is its last token. Kept as a frozenset.

    Raises:
        TypeError: a field is of another type: a float or bool for an integer, an id that is no integer, text.
        ValueError: a number is out of its range, or the prompt is empty.
    """

    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Collection[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.prompt, (set, frozenset)):
            raise TypeError(f"prompt is a {type(self.prompt).__name__}, which has no order; it must be a sequence")
        checked = {
            "prompt": tuple(token_ids("prompt", self.prompt)),
            "max_tokens": integer("max_tokens", self.max_tokens, least=1),
            "temperature": _number("temperature", self.temperature, float(torch.finfo(torch.float32).max)),
            "top_p": _number("top_p", self.top_p, 1.0),
            "seed": integer("seed", self.seed, *_SEEDS),
            "stop": frozenset(token_ids("stop", self.stop)),
        }
        if not checked["prompt"]:
            raise ValueError("prompt is empty; it must have at least one token, such as the model's bos_token_id")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def token_ids(name: str, ids: Any) -> list[int]:
    """The token ids of any collection, tensor or array, as numbers.

    Raises:
        TypeError: it is no such collection, or an id is no integer.
        ValueError: an id is negative.
    """
    if hasattr(ids, "tolist"):  # a tensor or an array, whose own elements are slow to look at
        ids = ids.tolist()
    if not isinstance(ids, Collection) or isinstance(ids, (str, bytes, bytearray)):
        raise TypeError(f"{name} is a {type(ids).__name__}; it must be a collection of token ids")
    if {int}.issuperset(map(type, ids)):
        found: list[int] = list(ids)
    else:
        found = [integer(f"{name}[{i}]", x) for i, x in enumerate(ids)]
    if found and min(found) < 0:
        raise ValueError(f"{name} has token {min(found)}; ids must be 0 or more")
    return found


def check_vocabulary(name: str, ids: Collection[int], size: int) -> None:
    """Raise a ValueError where an id is ``size`` or more."""
    if ids and max(ids) >= size:
        raise ValueError(f"{name} has token {max(ids)}; ids must be from 0 to {size - 1}")


def _number(name: str, value: float, most: float) -> float:
    """The value as a float from 0 to ``most``, within the range of float32, in which the device gets it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a float")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number <= most:
        raise ValueError(f"{name} is {number:g}; it must be between 0 and {most:g}")
    return number
