"""linghe's Triton kernels of lightning attention, forward and backward, as its functions are called by default."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers._checkout import checkout
from benchmarks.peers._slopes import slopes_of
from lightning_attention.bench.peers import ATTENTION, Forward, Peer

WIDTH, LENGTH = 128, 32  # what head widths and lengths must be multiples of; its kernels do not look at widths


class _Attention(torch.autograd.Function):
    """Its two functions, which PyTorch's autograd does not know, as one that it does."""

    @staticmethod
    def forward(ctx: Any, la: ModuleType, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        ctx.la = la
        ctx.save_for_backward(q, k, v, slopes)
        out: Tensor = la.triton_lightning_attention_forward(q, k, v, slopes, softmax_scale=1.0)[0]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dqkv = ctx.la.triton_lightning_attention_backward(dout, *ctx.saved_tensors, softmax_scale=1.0)
        return None, *dqkv, None


def _attention() -> Forward:
    la = checkout("linghe.attn.la", "github.com/inclusionAI/linghe")

    def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        T, H, D = q.shape[1:]
        if D % WIDTH or T % LENGTH or v.shape != q.shape:
            raise ValueError(f"linghe wants D = E, a multiple of {WIDTH}, and T of {LENGTH}")
        out: Tensor = _Attention.apply(la, q, k, v, slopes_of(log_decay, H, q.device))
        return out

    return forward


PEERS = (Peer("linghe", "linghe", "linghe", {ATTENTION: _attention}),)
