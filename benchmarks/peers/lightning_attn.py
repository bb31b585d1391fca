"""The package of the papers' authors."""

from importlib import import_module

from lightning_attention.bench.peers import ATTENTION, Forward, Peer


def _attention() -> Forward:
    lightning_attn_func = import_module("lightning_attn.ops").lightning_attn_func
    return lambda q, k, v, log_decay: lightning_attn_func(q, k, v, -log_decay.view(-1, 1, 1))


PEERS = (Peer("lightning_attn", "lightning_attn", "lightning-attn", {ATTENTION: _attention}, heads_first=True),)
