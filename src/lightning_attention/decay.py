"""Per-head decay schedules of the published models.

Every function returns ``log_decay``, a float32 tensor of shape [H] with the natural logarithm of each head's
decay λ ∈ (0, 1] per token, ready for the ``log_decay`` argument of the operations; on the default device, and where
that is the meta device on the CPU, since a schedule without numbers is none. Published formulas that look
alike differ in ways that matter (a head that never decays, a shift of one layer), so each has a name here.
"""

import math

import torch
from torch import Tensor


def alibi(num_heads: int) -> Tensor:
    """ALiBi slopes, −2^(−8(h+1)/H): MiniCPM-SALA on every layer, and the base of the schedules below.

    For H not a power of two, the slopes of the power of two below H come first, followed by every other slope of
    twice that power (arXiv 2108.12409, appendix).

    Raises:
        ValueError: ``num_heads`` is not positive.
    """
    return _negated(_slopes(num_heads))


def transnormer(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """TransNormerLLM, every release: ALiBi slopes times (1 − l/(L−1) + 1e-5), l = 0..L−1.

    Raises:
        ValueError: ``num_heads`` or ``num_layers`` is not positive, or ``layer`` is not in [0, num_layers).
    """
    _check_layer(layer, num_layers)
    return _scaled(num_heads, 1 - layer / max(num_layers - 1, 1) + 1e-5)


def minimax(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """MiniMax-Text-01 and M1: ALiBi slopes times (1 − l/(L−1+1e-5) + 1e-5), l = 0..L−1.

    Raises:
        ValueError: ``num_heads`` or ``num_layers`` is not positive, or ``layer`` is not in [0, num_layers).
    """
    _check_layer(layer, num_layers)
    return _scaled(num_heads, 1 - layer / (num_layers - 1 + 1e-5) + 1e-5)


def bailing(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Ring-linear-2.0, Ling and Ring 2.5 and 2.6: ALiBi slopes times (1 − (l−1)/(L−1) + 1e-5), l = 0..L−1.

    The l−1, with l from 0, is in the released modelling code: the first layer decays faster than ALiBi. SGLang and vLLM
    have l in its place, and so the decays of :func:`transnormer`.

    Raises:
        ValueError: ``num_heads`` or ``num_layers`` is not positive, or ``layer`` is not in [0, num_layers).
    """
    _check_layer(layer, num_layers)
    return _scaled(num_heads, 1 - (layer - 1) / max(num_layers - 1, 1) + 1e-5)


def retnet(num_heads: int) -> Tensor:
    """RetNet (arXiv 2307.08621, Eq. 8): log(1 − 2^(−5−h)), the same on every layer.

    Raises:
        ValueError: ``num_heads`` is not positive.
    """
    _check_heads(num_heads)
    # log1p: 1 − 2^(−5−h) rounds to 1 for h > 48, and a head that never forgets is not what was asked for.
    return _tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)])


def fla_lightning(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Flash-linear-attention's ``chunk_lightning_attn``: −(8/H)(1 − l/L) h, l = 0..L−1. Head 0 never forgets.

    Raises:
        ValueError: ``num_heads`` or ``num_layers`` is not positive, or ``layer`` is not in [0, num_layers).
    """
    _check_heads(num_heads)
    _check_layer(layer, num_layers)
    return _tensor([-8 / num_heads * (1 - layer / num_layers) * h for h in range(num_heads)])


def _slopes(num_heads: int) -> list[float]:
    _check_heads(num_heads)
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += _slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def _scaled(num_heads: int, factor: float) -> Tensor:
    return _negated([slope * factor for slope in _slopes(num_heads)])


def _negated(slopes: list[float]) -> Tensor:
    return _tensor([-slope for slope in slopes])


def _tensor(values: list[float]) -> Tensor:
    # Numbers, where a model is built on the meta device too: they are in no checkpoint that could bring them later.
    device = torch.get_default_device()
    return torch.tensor(values, dtype=torch.float32, device="cpu" if device.type == "meta" else device)


def _check_heads(num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; it must be at least 1")


def _check_layer(layer: int, num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 1")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer is {layer}; it must be in [0, {num_layers})")
