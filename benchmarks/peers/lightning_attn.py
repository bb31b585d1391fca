"""The package of the papers' authors."""

from importlib import import_module

from torch import Tensor

from benchmarks.peers._slopes import slopes_of
from lightning_attention.bench.peers import ATTENTION, Forward, Peer


def _attention() -> Forward:
    lightning_attn_func = import_module("lightning_attn.ops").lightning_attn_func

    def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        out: Tensor = lightning_attn_func(q, k, v, slopes_of(log_decay, q.shape[1], q.device).view(-1, 1, 1))
        return out

    return forward


PEERS = (Peer("lightning_attn", "lightning_attn", "lightning-attn", {ATTENTION: _attention}, heads_first=True),)
