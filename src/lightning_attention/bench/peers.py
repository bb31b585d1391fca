"""The implementations that a benchmark compares: ours, and softmax attention, which every PyTorch has.

Those of other packages are files of ``benchmarks/peers`` in the repository.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

#: (q, k, v, log_decay) -> o, in the implementation's own layout
Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

OURS, OUR_MODEL = "lightning_attention", "transnormer"
ATTENTION, PACKED_ATTENTION = "attention", "packed attention"


@dataclass(frozen=True)
class Peer:
    """What an implementation is, and how each operation that it has is called.

    ``operations``: by name, a function that imports the package and prepares calls. ``"attention"`` takes nothing and
    gives a :data:`Forward`, ``"packed attention"`` takes cu_seqlens [N + 1] int32 and gives one for B = 1; the
    case that measures another operation says what that takes and gives.

    ``heads_first``: attention takes [B, H, T, D] instead of [B, T, H, D]. ``softmax``: it computes softmax attention,
    so its time grows with T² and its numbers are not compared. ``backward``: attention has a backward pass.
    ``states``: the types of state that it takes.
    ``against``: the name of the one that its time is held against, where that is measured too.
    """

    name: str
    label: str
    package: str
    operations: Mapping[str, Callable[..., Any]]
    heads_first: bool = False
    softmax: bool = False
    backward: bool = True
    states: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    against: str | None = None

    def ordered(self, x: Tensor) -> Tensor:
        """A tensor [B, T, H, ·] in the layout of its attention."""
        return x.transpose(1, 2).contiguous() if self.heads_first else x

    def attention(self) -> Forward:
        """The forward pass, its package imported."""
        forward: Forward = self.operations[ATTENTION]()
        return forward


def ours(backend: str | None = None, **more: Any) -> Peer:
    """``lightning_attention`` on the named backend, or on the device's, with ``more`` of its arguments."""

    def load() -> Forward:
        from lightning_attention import lightning_attention

        return lambda q, k, v, log_decay: lightning_attention(q, k, v, log_decay, backend=backend, **more).output

    name = OURS if backend is None else f"{OURS}:{backend}"
    return Peer(name, "lightning attention", "lightning-attention", {ATTENTION: load})


def is_ours(name: str) -> bool:
    """Whether a record's implementation is ours, on whatever backend."""
    return name.partition(":")[0] in (OURS, OUR_MODEL)


def _softmax(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:  # noqa: ARG001
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _load_softmax(backend: str | None) -> Forward:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if backend is None:
        return _softmax
    chosen = getattr(SDPBackend, backend)

    def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        with sdpa_kernel(chosen):
            return _softmax(q, k, v, log_decay)

    return forward


def _sdpa(name: str, label: str, backend: str | None, device: str) -> Peer:
    load = {ATTENTION: partial(_load_softmax, backend)}
    return Peer(name, label, "torch", load, heads_first=True, softmax=True, devices=(device,))


#: PyTorch's softmax attention: on a GPU each of its fast backends by itself; ROCm has no cuDNN.
SDPA = (
    _sdpa("sdpa", "softmax attention", None, "cpu"),
    *((_sdpa("sdpa_cudnn", "softmax (cuDNN)", "CUDNN_ATTENTION", "cuda"),) if torch.version.hip is None else ()),
    _sdpa("sdpa_flash", "softmax (flash)", "FLASH_ATTENTION", "cuda"),
)
