"""Flash-linear-attention's functions whose decay is one number per head, computed by this project's operations.

    from lightning_attention.integrations.flash_linear_attention import chunk_simple_gla

in place of ``from fla.ops.simple_gla import chunk_simple_gla``; fla need not be installed. Signatures, layouts and
defaults are those of fla 0.6.0:

- q and k are [B, T, H, K] and v is [B, T, H, V], bfloat16, float16 or float32, K up to 256 on a GPU. Where fla takes
  ``**kwargs``, ``head_first=True`` of its older versions means [B, H, T, ...], for the output too.
- ``scale`` is a factor on the output; None is K^(-1/2). ``g_gamma`` is read in float32, from any floating-point dtype.
- ``initial_state`` is [N, H, K, V], or [N, H, V, K] with ``state_v_first``, and so is the final state, float32, or None
  without ``output_final_state``. With ``cu_seqlens`` [N+1], B is 1.
- ``reverse`` reads every sequence from its last token to its first.

"chunk", "fused" and "parallel" are one thing here, and ``chunk_size`` and ``cu_seqlens_cpu`` change nothing. Everything
is differentiable, ``g_gamma`` too, which has no gradient in fla. Calls compile; fla's chunked ones break the graph. The
operation's errors name its own arguments: ``g_gamma`` is ``log_decay`` there. docs/migrating.md has more.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_attention.integrations.engines import put_back, put_in_place
from lightning_attention.ops import validation
from lightning_attention.ops.attention import lightning_attention
from lightning_attention.ops.operation import cast_for_autocast

_COLUMNS_OF_ONES = 8  # of what the normaliser is computed with: 16 bytes, as the copy engine wants them


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,  # noqa: ARG001 (nothing is read on the host)
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with decays exp(``g_gamma``), [H]; None for no decay.

    Raises:
        NotImplementedError: ``g`` is given: decays that depend on the token are another operation.
        TypeError, ValueError: as the operation, and for keywords that are not known.
    """
    head_first = _keywords(kwargs)
    log_decay = _fixed(g, g_gamma)
    return _attend(
        q, k, v, log_decay, scale, initial_state, output_final_state, cu_seqlens, state_v_first=state_v_first,
        head_first=head_first,
    )  # fmt: skip


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_simple_gla`."""
    return _attend(q, k, v, _fixed(g, g_gamma), scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_simple_gla`, in either direction."""
    state_v_first = _state_v_first(state_v_first, kwargs)
    head_first = _keywords(kwargs)
    return _attend(
        q, k, v, _fixed(g, g_gamma), scale, initial_state, output_final_state, cu_seqlens, reverse, state_v_first,
        head_first,
    )  # fmt: skip


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the decays of ``decay.fla_lightning``, which no released model has."""
    head_first = _keywords(kwargs)
    log_decay = _lightning(v, layer_idx, num_layers, head_first)
    return _attend(q, k, v, log_decay, scale, initial_state, output_final_state, cu_seqlens, head_first=head_first)


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_lightning_attn`, in either direction."""
    log_decay = _lightning(v, layer_idx, num_layers)
    return _attend(q, k, v, log_decay, scale, initial_state, output_final_state, cu_seqlens, reverse)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the decays of RetNet, ``decay.retnet``."""
    head_first = _keywords(kwargs)
    log_decay = _retnet(v, head_first)
    return _attend(q, k, v, log_decay, scale, initial_state, output_final_state, cu_seqlens, head_first=head_first)


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_retention`."""
    return _attend(q, k, v, _retnet(v), scale, initial_state, output_final_state, cu_seqlens)


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """:func:`chunk_retention` without states, in time linear in T.

    Raises:
        NotImplementedError: ``output_attentions``: the scores are never in memory.
    """
    if output_attentions:
        raise NotImplementedError("output_attentions is True, but no scores are computed here; call fla's own function")
    return _attend(q, k, v, _retnet(v), scale, cu_seqlens=cu_seqlens)[0], None


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_retention`, in either direction."""
    state_v_first = _state_v_first(state_v_first, kwargs)
    head_first = _keywords(kwargs)
    return _attend(
        q, k, v, _retnet(v, head_first), scale, initial_state, output_final_state, cu_seqlens, reverse, state_v_first,
        head_first,
    )  # fmt: skip


State = Tensor | tuple[Tensor, Tensor]


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Attention without decay and, with ``normalize``, each output divided by scale · q_t Σ_{s≤t} k_s + 1e-10.

    With ``normalize`` a state is a pair, the second of which is the sum of k, [N, 1, H, K]; as in fla the final one is
    a pair even without ``output_final_state``, with None for its first. The sum is float32; fla's has k's dtype.
    float16 is computed in float32, which takes longer: what is divided grows past what float16 holds.

    Raises:
        TypeError, ValueError: as the operation; a pair comes without ``normalize``, or the sum in it has another shape.
    """
    return _linear(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, False)


fused_chunk_linear_attn = chunk_linear_attn


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """:func:`chunk_linear_attn`, in either direction, and not normalised unless that is asked for."""
    return _linear(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, reverse)


#: By the module of fla that has them. Those of simple_gla are not put in fla's place: its models hand them g.
_FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "fla.ops.retention": {
        "chunk_retention": chunk_retention,
        "fused_chunk_retention": fused_chunk_retention,
        "parallel_retention": parallel_retention,
        "fused_recurrent_retention": fused_recurrent_retention,
    },
    "fla.ops.lightning_attn": {
        "chunk_lightning_attn": chunk_lightning_attn,
        "fused_recurrent_lightning_attn": fused_recurrent_lightning_attn,
    },
    "fla.ops.linear_attn": {
        "chunk_linear_attn": chunk_linear_attn,
        "fused_chunk_linear_attn": fused_chunk_linear_attn,
        "fused_recurrent_linear_attn": fused_recurrent_linear_attn,
    },
}


def apply_lightning_attention() -> None:
    """Let fla's own layers call the functions above, in this process: RetNet's, and those of linear attention.

    Layers, weights, caches and their states stay fla's. The functions are also replaced wherever fla's modules have
    imported them; whether models are made before or after makes no difference.

    Raises:
        ModuleNotFoundError: fla is not installed.
        ValueError: a function of fla is not there, or takes other parameters than ours; nothing is then changed.
    """
    put_in_place(*_in_fla())


def remove_lightning_attention() -> None:
    """Undo :func:`apply_lightning_attention`.

    Raises:
        ModuleNotFoundError: fla is not installed.
        ValueError: another function has since been put in the place of ours.
    """
    put_back(*_in_fla())


def _in_fla() -> list[tuple[ModuleType, dict[str, Callable[..., Any]]]]:
    return [(import_module(module), functions) for module, functions in _FUNCTIONS.items()]


def _linear(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, initial_state: State | None, output_final_state: bool,
    normalize: bool, cu_seqlens: Tensor | None, reverse: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    pair = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    if len(pair) != 2:
        raise ValueError(
            f"initial_state is a tuple of {len(pair)}; it must be a state, or a pair of it and the sum of k"
        )
    kv, sum_of_k = pair
    if not normalize:
        if sum_of_k is not None:
            raise ValueError("initial_state is a pair and normalize is False; the sum of k is for normalize=True")
        return _attend(q, k, v, None, scale, kv, output_final_state, cu_seqlens, reverse)
    _check_ranks(q, k, v)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = cast_for_autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):  # or what follows would be rounded to float16 again
            return _linear(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, reverse)
    # Sums over a sequence, before they are divided, go past float16's 65504.
    dtype = v.dtype
    q, k, v = (x.float() if x.dtype == torch.float16 else x for x in (q, k, v))
    out, final = _attend(q, k, v, None, scale, kv, output_final_state, cu_seqlens, reverse)
    # The same operation on ones: a column of them beside v would leave the widths that the kernels are fast at.
    ones = v.new_ones(*v.shape[:-1], _COLUMNS_OF_ONES)
    if sum_of_k is not None:
        N = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        validation.check_tensor("initial_state[1]", sum_of_k)
        validation.check_shape("initial_state[1]", sum_of_k, (N, 1, v.shape[2], k.shape[3]), "[N, 1, H, K]")
        sum_of_k = sum_of_k[:, 0, :, :, None].expand(*(-1,) * 3, _COLUMNS_OF_ONES)
    total, sum_of_k = _attend(q, k, ones, None, scale, sum_of_k, True, cu_seqlens, reverse)
    assert sum_of_k is not None
    total = total[..., :1].to(sum_of_k.dtype) + 1e-10
    return (out / total).to(dtype), (final, sum_of_k[..., 0].unsqueeze(1))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float | None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    reverse: bool = False, state_v_first: bool = False, head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    _check_ranks(q, k, v, head_first)
    if head_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    order = None
    if reverse:
        validation.check_inputs(q, k, v, log_decay, "BT")
        order = _reversed(q, cu_seqlens)
    q, k, v = (_turned(x, order) for x in (q, k, v))
    if initial_state is not None and state_v_first:
        validation.check_rank("initial_state", initial_state, "[N, H, V, K]")
        initial_state = initial_state.mT
    out, final = lightning_attention(
        q, k, v, log_decay, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out = _turned(out, order)
    if final is not None and state_v_first:
        final = final.mT.contiguous()
    return out.transpose(1, 2) if head_first else out, final


def _check_ranks(q: Tensor, k: Tensor, v: Tensor, head_first: bool = False) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, x, head_first)


def _check_rank(name: str, x: Tensor, head_first: bool) -> None:
    width = "V" if name == "v" else "K"
    validation.check_rank(name, x, f"[B, H, T, {width}]" if head_first else f"[B, T, H, {width}]")


def _reversed(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For each token the place of the one that it changes places with, [T]; padding after the last stays."""
    place = torch.arange(q.shape[1], device=q.device)
    if cu_seqlens is None:
        return place.flip(0)
    validation.check_cu_seqlens(cu_seqlens, q)
    cuts = cu_seqlens.long()
    sequence = torch.searchsorted(cuts, place, right=True).clamp(1, len(cuts) - 1)
    changed = cuts[sequence - 1] + cuts[sequence] - 1 - place
    # What is wrong with the numbers the operation says, where it may look at them.
    return torch.where(place < cuts[-1], changed, place).clamp(0, max(len(place) - 1, 0))


def _turned(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)


def _fixed(g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    if g is not None:
        raise NotImplementedError(
            "g is given, decays that depend on the token; this function has one decay per head, g_gamma [H]; for g "
            "call fla's own"
        )
    if g_gamma is None:
        return None
    validation.check_floats("g_gamma", g_gamma)
    return g_gamma.float()


# As decay.py has them, but made on the device: a copy from the host would stand in the way of CUDA graphs.
def _retnet(v: Tensor, head_first: bool = False) -> Tensor:
    # Not exp2, which PyTorch compiles at the first call in a process.
    return torch.log1p(-torch.pow(2.0, -5.0 - _heads(v, head_first)))


def _lightning(v: Tensor, layer: int, num_layers: int, head_first: bool = False) -> Tensor:
    num_layers = validation.integer("num_layers", num_layers, least=1)
    layer = validation.integer("layer_idx", layer, least=0, most=num_layers - 1)
    heads = _heads(v, head_first)
    return heads * (-8 / len(heads) * (1 - layer / num_layers))


def _heads(v: Tensor, head_first: bool) -> Tensor:
    """0, 1, …, H − 1 on v's device."""
    _check_rank("v", v, head_first)
    return torch.arange(v.shape[1 if head_first else 2], dtype=torch.float32, device=v.device)


def _state_v_first(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """``state_v_first`` by either of its names; the former one is taken out of ``kwargs``."""
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError("state_v_first and its former name transpose_state_layout are both given; give the first")
    warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3)
    return kwargs.pop("transpose_state_layout")


def _keywords(kwargs: dict[str, Any]) -> bool:
    """Whether the layout is head first. Refuses keywords that fla's functions do not look at."""
    unknown = kwargs.keys() - {"head_first", "chunk_size"}
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))} is no argument of this function")
    return kwargs.get("head_first", False)
