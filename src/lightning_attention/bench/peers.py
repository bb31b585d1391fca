"""The implementations that a benchmark compares: ours, and other people's where they are installed.

A peer's package is imported only when the peer is asked for. Nothing here is used outside the benchmarks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

#: (q, k, v, log_decay) -> o, in the implementation's own layout
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

OURS = "lightning_attention"


@dataclass(frozen=True)
class Implementation:
    """How to call one implementation, and what it is.

    ``heads_first``: it takes [B, H, T, D] instead of [B, T, H, D]. ``softmax``: it computes softmax attention, so
    its time grows with T² and its numbers are not to be compared.
    """

    name: str
    label: str
    package: str
    load: Callable[[], Forward]
    heads_first: bool = False
    softmax: bool = False

    def version(self) -> str | None:
        """The installed package's version, or None."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def ours(backend: str | None = None) -> Implementation:
    """``lightning_attention`` on the named backend, or on the one that the device gets."""

    def load() -> Forward:
        from lightning_attention import lightning_attention

        return lambda q, k, v, log_decay: lightning_attention(q, k, v, log_decay, backend=backend).output

    name = OURS if backend is None else f"{OURS}:{backend}"
    return Implementation(name, "lightning attention", "lightning-attention", load)


def _load_fla() -> Forward:
    chunk_simple_gla = import_module("fla.ops.simple_gla").chunk_simple_gla
    return lambda q, k, v, log_decay: chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0)[0]


def _load_lightning_attn() -> Forward:
    lightning_attn_func = import_module("lightning_attn.ops").lightning_attn_func
    return lambda q, k, v, log_decay: lightning_attn_func(q, k, v, -log_decay.view(-1, 1, 1))


def _load_sdpa() -> Forward:
    from torch.nn.functional import scaled_dot_product_attention

    return lambda q, k, v, log_decay: scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: ARG005


def _load_sdpa_on(backend: str) -> Forward:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention, chosen = _load_sdpa(), getattr(SDPBackend, backend)

    def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return attention(q, k, v, log_decay)

    return forward


def _sdpa(name: str, label: str, load: Callable[[], Forward]) -> Implementation:
    return Implementation(name, label, "torch", load, heads_first=True, softmax=True)


PEERS = ("fla", "lightning_attn", "sdpa")


def peers(names: list[str], device: torch.device) -> list[Implementation]:
    """The implementations behind the names; ``sdpa`` stands for each of the device's fast backends.

    Raises:
        ValueError: a name is not one of ``PEERS``.
    """
    found: list[Implementation] = []
    for name in names:
        if name == "fla":
            found.append(Implementation("fla", "flash-linear-attention", "flash-linear-attention", _load_fla))
        elif name == "lightning_attn":
            label = "lightning_attn"
            found.append(Implementation(name, label, "lightning-attn", _load_lightning_attn, heads_first=True))
        elif name == "sdpa" and device.type != "cuda":
            found.append(_sdpa("sdpa", "softmax attention", _load_sdpa))
        elif name == "sdpa":
            if torch.version.hip is None:
                found.append(_sdpa("sdpa_cudnn", "softmax (cuDNN)", partial(_load_sdpa_on, "CUDNN_ATTENTION")))
            load = partial(_load_sdpa_on, "FLASH_ATTENTION")
            found.append(_sdpa("sdpa_flash", "softmax (flash)", load))
        else:
            raise ValueError(f"peers has {name!r}; it must be among {', '.join(map(repr, PEERS))}")
    return found
