"""What the supported versions of transformers hand to a forward pass, by which names; anything else is an error."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

AnyCache = TypeVar("AnyCache", bound=Cache)

#: The cache's name in this version of transformers: in calls, in ``generate`` and in outputs. 5.24 renamed
#: ``past_key_values`` to ``cache``.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

#: Keywords that come to every model and change nothing in one without attention maps.
UNUSED = frozenset(
    {
        "output_attentions",  # generate, pipelines and PEFT, whatever its value; there are no maps
        "output_router_logits",  # transformers' common keywords; there are no experts
        "num_items_in_batch",  # Trainer, which counts labels; the loss takes it, nothing else does
        "skip_logits",  # Trainer with use_liger_kernel, in evaluation; a model with a head of ours takes it
        "token_type_ids",  # tokenizers that number the texts of a pair
        "max_length_q",  # DataCollatorWithFlattening, beside cu_seq_lens_q
        "max_length_k",
        "is_causal",  # transformers' common keywords; False is refused below
    }
)


def given_cache(kind: type[AnyCache], cache: Cache | None, past_key_values: Cache | None) -> AnyCache | None:
    """The cache of a call, by whichever of its two names it came.

    Args:
        kind: the class it must be of.
        cache: its name since transformers 5.24.
        past_key_values: its name before.

    Raises:
        ValueError: both are given.
        TypeError: it is a cache of another kind.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are both given; they are two names of one thing")
    name, given = ("past_key_values", past_key_values) if cache is None else ("cache", cache)
    if given is not None and not isinstance(given, kind):
        raise TypeError(f"{name} is a {type(given).__name__}; it must be a {kind.__name__}")
    return given


def check_keywords(owner: object, keywords: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Refuse a keyword that is neither in ``known`` nor in :data:`UNUSED`, whatever its value.

    transformers wants ``**kwargs`` in a forward pass. They would swallow a misspelt name, or
    one that a newer version hands over, and the result would be computed without it.

    Raises:
        TypeError: there is such a keyword.
        ValueError: ``is_causal`` is False.
    """
    for name in keywords:
        if name not in known and name not in UNUSED:
            raise TypeError(f"{type(owner).__name__}.forward() got an unexpected keyword argument {name!r}")
    if keywords.get("is_causal") is False:
        raise ValueError("is_causal is False; linear attention with a decay reads what came before, nothing else")
