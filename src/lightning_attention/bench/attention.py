"""Time and memory of one shape: forward, backward, and both."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import copy
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_attention import decay
from lightning_attention.bench.peers import Peer
from lightning_attention.bench.timing import Call, peak_bytes, time_calls, wall_ms

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


#: Instead of a measurement.
NO_BACKWARD = {"skipped": "it has no backward pass"}


def has(peer: Peer, pass_: str) -> bool:
    """Whether attention has the pass."""
    return peer.backward or pass_ == FORWARD


class Shape(NamedTuple):
    """[B, T, H, D], with E = D."""

    B: int
    T: int
    H: int
    D: int


class Problem:
    """Random normal q, k, v and output gradient of a shape.

    ``E``: columns of v, D if not given. ``log_decay``: ALiBi's if not given. ``learnable``: it requires grad.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, *, E: int | None = None,
        log_decay: Callable[[int], Tensor | None] = decay.alibi, learnable: bool = False,
    ) -> None:  # fmt: skip
        self.shape, self.dtype, self.device, self.learnable = shape, dtype, device, learnable
        self.sizes = shape._asdict() | {"dtype": dtype}  # as a record has them
        generator = torch.Generator(device).manual_seed(0)
        widths = shape.D, shape.D, E or shape.D, E or shape.D
        self.tensors = [torch.randn(*shape[:3], width, generator=generator, dtype=dtype, device=device)
                        for width in widths]  # fmt: skip
        found = log_decay(shape.H)
        self.log_decay = None if found is None else found.to(device)

    def inputs(self, peer: Peer, *, grad: bool) -> list[Tensor]:
        """q, k, v and the output's gradient, laid out as the peer wants them; ``grad``: q, k, v require theirs."""
        *qkv, do = map(peer.ordered, self.tensors)
        return [*(x.detach().requires_grad_(grad) for x in qkv), do]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with ``change`` applied to each tensor; ``sizes`` stay those of the whole."""
        found = copy(self)
        found.tensors = [change(x) for x in self.tensors]
        return found

    def _decay(self, *, grad: bool) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """log_decay, and what of it gradients are asked for."""
        if self.log_decay is None or not (self.learnable and grad):
            return self.log_decay, ()
        learned = self.log_decay.detach().requires_grad_()
        return learned, (learned,)

    def results(self, peer: Peer) -> list[Tensor]:
        """The output and the gradients of q, k and v, each [B, T, H, *], and of a learnable log_decay, [H].

        From a peer without a backward pass, the output alone.
        """
        q, k, v, do = self.inputs(peer, grad=peer.backward)
        log_decay, learned = self._decay(grad=peer.backward)
        out = peer.attention()(q, k, v, log_decay)
        gradients = torch.autograd.grad(out, (q, k, v, *learned), do) if peer.backward else ()
        found = [out.detach(), *gradients]
        return [x.transpose(1, 2) if x.ndim == 4 else x for x in found] if peer.heads_first else found

    def call(self, peer: Peer, pass_: str) -> Call:
        """A call that runs one pass on tensors laid out as the implementation wants them."""
        forward, grad = peer.attention(), pass_ != FORWARD
        q, k, v, do = self.inputs(peer, grad=grad)
        log_decay, learned = self._decay(grad=grad)
        if pass_ == FORWARD:
            return lambda: forward(q, k, v, log_decay)
        wanted = q, k, v, *learned
        if pass_ == BACKWARD:
            out = forward(q, k, v, log_decay)
            return lambda: torch.autograd.grad(out, wanted, do, retain_graph=True)
        return lambda: torch.autograd.grad(forward(q, k, v, log_decay), wanted, do)


def result_or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a measurement, or ``{"error": why}``: also for a peer that is missing or broken."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}


def measure(peers: list[Peer], problem: Problem, pass_: str, *, seconds: float) -> dict[str, dict[str, Any]]:
    """One pass of every implementation, timed in turns: a record each, or ``{"error": why}``.

    On a GPU they are timed one by one, because the tensors of all of them do not fit at the large shapes.
    """
    found: dict[str, dict[str, Any]] = {p.name: dict(NO_BACKWARD) for p in peers}
    peers = [p for p in peers if has(p, pass_)]
    device, tokens = problem.device, problem.shape.B * problem.shape.T
    calls: dict[str, Call] = {}

    def prepare(peer: Peer) -> dict[str, Any]:
        call, first = problem.call(peer, pass_), None
        if device.type == "cuda":  # compiling and autotuning, whose buffers are not the call's
            first = wall_ms(call, device) * 1e-3
        result = {"first_call_s": first, "peak_bytes": peak_bytes(call, device)}
        calls[peer.name] = call
        return result

    for group in [[p] for p in peers] if device.type == "cuda" else [peers]:
        found |= {p.name: result_or_error(partial(prepare, p)) for p in group}
        for name, timing in time_calls(calls, device, seconds=seconds).items():
            found[name] |= asdict(timing) | {"us_per_token": timing.ms * 1e3 / tokens}
            found[name]["bytes_per_token"] = found[name]["peak_bytes"] / tokens
        calls.clear()
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return found
