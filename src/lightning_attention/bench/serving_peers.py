"""How each implementation decodes, prefills and checks drafts: ours, and other people's where they are installed.

What can be prepared once for all layers of a model (metadata, slopes, other layouts of the inputs) is prepared here,
outside the call that is timed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_attention import (
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from lightning_attention.bench.peers import OURS


@dataclass(frozen=True)
class Batch:
    """N packed sequences and the pool that has their states.

    q, k, v [T, H, D]; log_decay [H]; pool [N, H, D, D]; slots [N] int32; cu_seqlens [N+1] int32. ``fresh``: all
    sequences start from zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    pool: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    fresh: bool

    @property
    def N(self) -> int:
        return self.slots.shape[0]

    def initial(self) -> Tensor | None:
        """The states that the sequences start from, in their order, or None where that is zero."""
        return None if self.fresh else self.pool[self.slots.long()]


class Bound(NamedTuple):
    """A call on tensors of its own, and the states after the last one.

    The call gives the T·H·D numbers of the output in any shape of that order, or [N, H, D] for each step.
    ``states`` gives [N, H, D, D] in the order of the sequences, or None for a call whose numbers are not checked.
    """

    call: Callable[[], Tensor | list[Tensor]]
    states: Callable[[], Tensor | None]


Bind = Callable[[Batch], Bound]


@dataclass(frozen=True)
class Server:
    """What an implementation can do, by the name of the case, and the types of state that it takes."""

    name: str
    label: str
    package: str
    binds: dict[str, Bind]
    states: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def _pooled(batch: Batch, run: Callable[[Tensor], Tensor | list[Tensor]]) -> Bound:
    """A call that updates a pool in place."""
    pool, slots = batch.pool.clone(), batch.slots.long()
    return Bound(lambda: run(pool), lambda: pool[slots])


# Ours


def _decode(b: Batch) -> Bound:
    return _pooled(b, lambda pool: lightning_attention_decode(b.q, b.k, b.v, b.log_decay, pool, slots=b.slots))


def _prefill(b: Batch) -> Bound:
    fresh = torch.ones(b.N, dtype=torch.bool, device=b.q.device) if b.fresh else None

    def run(pool: Tensor) -> Tensor:
        at = b.cu_seqlens
        return lightning_attention_prefill(b.q, b.k, b.v, b.log_decay, pool, cu_seqlens=at, slots=b.slots, fresh=fresh)

    return _pooled(b, run)


def _speculate(b: Batch) -> Bound:
    accepted = torch.ones(b.q.shape[0], dtype=torch.bool, device=b.q.device)

    def run(pool: Tensor) -> Tensor:
        at, slots = b.cu_seqlens, b.slots
        out = lightning_attention_verify(b.q, b.k, b.v, b.log_decay, pool, cu_seqlens=at, slots=slots)
        lightning_attention_commit(b.k, b.v, b.log_decay, pool, cu_seqlens=at, accepted=accepted, slots=slots)
        return out

    return _pooled(b, run)


def _decode_each(b: Batch) -> Bound:
    """The drafts of every sequence, equally many, one decode call after another."""
    q, k, v = ([step.contiguous() for step in x.unflatten(0, (b.N, -1)).unbind(1)] for x in (b.q, b.k, b.v))

    def run(pool: Tensor) -> list[Tensor]:
        steps = zip(q, k, v, strict=True)
        return [lightning_attention_decode(*qkv, log_decay=b.log_decay, state=pool, slots=b.slots) for qkv in steps]

    return _pooled(b, run)


def _forward(b: Batch) -> Bound:
    """The training forward over the same packing; it returns new states."""
    q, k, v, initial = b.q[None], b.k[None], b.v[None], b.initial()
    finals: list[Tensor | None] = [None]

    def call() -> Tensor:
        out, finals[0] = lightning_attention(
            q, k, v, b.log_decay, initial_state=initial, output_final_state=True, cu_seqlens=b.cu_seqlens
        )
        return out

    return Bound(call, lambda: finals[0])


def _dense(b: Batch) -> Bound:
    """The training forward of one sequence of as many tokens: another function, so its numbers are not compared."""
    q, k, v = b.q[None], b.k[None], b.v[None]
    return Bound(lambda: lightning_attention(q, k, v, b.log_decay).output, lambda: None)


# Peers


def _module(package: str, *places: str) -> ModuleType:
    """The first of the files that the package has, as a module, without importing the package.

    An inference engine's own import wants dozens of packages that one of its kernels does not.
    """
    spec = find_spec(package)
    folders = [] if spec is None else [Path(x) for x in spec.submodule_search_locations or ()]
    for path in (folder / place for folder in folders for place in places):
        if path.exists():
            name = f"_{package}_{path.stem}"
            if name not in sys.modules:
                found = spec_from_file_location(name, path)
                assert found is not None
                assert found.loader is not None
                sys.modules[name] = module = module_from_spec(found)
                try:
                    found.loader.exec_module(module)
                except BaseException:
                    del sys.modules[name]
                    raise
            return sys.modules[name]
    raise ModuleNotFoundError(f"{package} is not installed, or has no {places[0]}")


def _sglang(file: str) -> ModuleType:
    return _module("sglang", f"kernels/ops/attention/linear/{file}", f"srt/layers/attention/linear/{file}")


def _seg_la(b: Batch) -> Bound:
    seg_la = _sglang("seg_la.py")
    lengths = b.cu_seqlens.diff()
    meta = seg_la.SegLaMeta(
        batch_size=b.N, max_q_length=None, q_offsets=b.cu_seqlens, s_offsets=b.slots, q_lengths=lengths,
        s_scales=torch.full_like(b.slots, int(not b.fresh)),
    )  # fmt: skip
    slopes = -b.log_decay
    return _pooled(b, lambda pool: seg_la.seg_la_fwd(b.q, b.k, b.v, pool, slopes, meta, softmax_scale=1.0))


def _seg_la_speculate(b: Batch) -> Bound:
    """seg_la keeps the state after every draft; to commit is to copy the last one accepted into the pool."""
    seg_la = _sglang("seg_la.py")
    meta = seg_la.SegLaMeta(
        batch_size=b.N, max_q_length=None, q_offsets=b.cu_seqlens, s_offsets=b.slots, q_lengths=b.cu_seqlens.diff(),
        s_scales=torch.ones_like(b.slots),
    )  # fmt: skip
    slopes, slots = -b.log_decay, b.slots.long()
    rows = torch.arange(b.N, dtype=torch.int32, device=b.q.device)
    after = b.pool.new_empty(b.N, b.q.shape[0] // b.N, *b.pool.shape[1:])

    def run(pool: Tensor) -> Tensor:
        out = seg_la.seg_la_fwd(
            b.q, b.k, b.v, pool, slopes, meta, caches=after, cache_indices=rows, softmax_scale=1.0
        )  # fmt: skip
        pool.index_copy_(0, slots, after[:, -1])
        return out

    return _pooled(b, run)


def _vllm(b: Batch) -> Bound:
    """The decode kernel of vLLM, in the copy that SGLang ships: vLLM's wheel is several hundred MB."""
    step = _sglang("lightning_attn.py").linear_decode_forward_triton
    q, k, v = (x.unsqueeze(2) for x in (b.q, b.k, b.v))
    slopes = -b.log_decay
    return _pooled(b, lambda pool: step(q, k, v, pool, slopes, b.slots))


def _fla(b: Batch) -> Bound:
    """Without a pool: the states are dense and come back as a new tensor; no gather or scatter is in the time."""
    step = import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
    q, k, v = (x.unsqueeze(1) for x in (b.q, b.k, b.v))
    initial, finals = b.initial(), [b.q.new_empty(0)]

    def call() -> Tensor:
        out, finals[0] = step(
            q, k, v, g_gamma=b.log_decay, scale=1.0, initial_state=initial, output_final_state=True
        )  # fmt: skip
        return out

    return Bound(call, lambda: finals[0])


DECODE, PREFILL, SPECULATE = "decode", "prefill", "verify + commit"

_OUR_OWN = (
    Server(OURS, "ours", "lightning-attention", {DECODE: _decode, PREFILL: _prefill, SPECULATE: _speculate}),
    Server("forward", "our forward, packed", "lightning-attention", {PREFILL: _forward}),
    Server("dense", "our forward, dense", "lightning-attention", {PREFILL: _dense}),
    Server("decodes", "our decode, one by one", "lightning-attention", {SPECULATE: _decode_each}),
)

_THEIRS = {
    "seg_la": Server("seg_la", "seg_la", "sglang",
                     {DECODE: _seg_la, PREFILL: _seg_la, SPECULATE: _seg_la_speculate}),
    # Its final state is float32 whatever the initial one is.
    "fla": Server("fla", "fla", "flash-linear-attention", {DECODE: _fla}, (torch.float32,)),
    "vllm": Server("vllm", "vLLM's kernel", "sglang", {DECODE: _vllm}),
}  # fmt: skip

SERVING_PEERS = tuple(_THEIRS)


def servers(names: list[str]) -> list[Server]:
    """Ours, the operations that ours are held against, and the peers that the names stand for.

    Raises:
        ValueError: a name is not one of ``SERVING_PEERS``.
    """
    for name in names:
        if name not in _THEIRS:
            raise ValueError(f"names has {name!r}; it must be among {', '.join(map(repr, SERVING_PEERS))}")
    return [_OUR_OWN[0], *(_THEIRS[name] for name in names), *_OUR_OWN[1:]]
