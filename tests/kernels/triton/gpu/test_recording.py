"""Calls made again from a recording give the bits of those that are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    RecentTokens,
    decay,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from tests.kernels.triton.support.device import assert_recorded_calls_repeat, needs_gpu

pytestmark = needs_gpu
BF16 = torch.bfloat16

SEQUENCES = {
    "dense": {},
    "split": {"shape": (1, 4096, 4, 64)},
    "states": {"states": True},
    "split, states": {"shape": (1, 4096, 4, 64), "states": True},
    "packed": {"shape": (1, 300, 4, 64), "lengths": [100, 7, 150]},
    "packed, split": {"shape": (1, 40_000, 2, 64), "lengths": [100, 39_000], "states": True},
    "learnable decay": {"learn": True},
    "batch invariant": {"invariant": True},
    "no decay": {"decays": False},
    "float32": {"dtype": torch.float32},
    "wide": {"shape": (2, 200, 2, 256)},
    "odd": {"shape": (2, 200, 2, 36)},
}


def sequences(
    shape: tuple[int, ...] = (2, 300, 4, 64), dtype: torch.dtype = BF16, lengths: Any = None, states: bool = False,
    learn: bool = False, invariant: bool = False, decays: bool = True,
) -> Callable[[int], list[Tensor]]:  # fmt: skip
    """Output, final state and gradients, of the tensors of a seed."""
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).cuda()
    N = shape[0] if lengths is None else len(lengths)

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        q, k, v, do = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(4))
        log_decay = decay.alibi(shape[2]).cuda() * (1 + seed) if decays else None
        initial = torch.randn(N, shape[2], shape[3], shape[3], device="cuda") if states else None
        inputs = [q, k, v, *([initial] if states else []), *([log_decay] if learn else [])]
        for x in inputs:
            x.requires_grad_()
        found = lightning_attention(q, k, v, log_decay, initial_state=initial, output_final_state=states, cu_seqlens=cu,
                                    batch_invariant=invariant)  # fmt: skip
        outputs = [x for x in found if x is not None]
        grads = [do, *(torch.randn_like(x) for x in outputs[1:])]
        return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

    return run


def pools(operation: str, rings: str = "") -> Callable[[int], list[Tensor]]:
    """Outputs and the pool afterwards, with what its rings hold, of the tensors of a seed."""
    N, H, D = 3, 4, 64
    lengths = [1] * N if operation == "decode" else [1, 300, 9]
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).cuda()

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        q, k, v = (torch.randn(sum(lengths), H, D, dtype=BF16, device="cuda") for _ in range(3))
        state, log_decay = torch.randn(8, H, D, D, device="cuda"), decay.alibi(H).cuda()
        recent = RecentTokens.empty(8, H, D, D, device="cuda") if rings else None
        pool = {"slots": torch.randperm(8, device="cuda")[:N].int(), "recent": recent}
        kept = [state]
        if recent is not None:
            recent.k.zero_(), recent.v.zero_(), recent.count.fill_(5)
            kept += [recent.k, recent.v, recent.count]
        if operation == "decode":
            return [lightning_attention_decode(q, k, v, log_decay, state, **pool), *kept]
        if operation == "prefill":
            fresh = torch.tensor([False, True, False], device="cuda")
            return [lightning_attention_prefill(q, k, v, log_decay, state, cu_seqlens=cu, fresh=fresh, **pool), *kept]
        if operation == "verify":
            return [lightning_attention_verify(q, k, v, log_decay, state, cu_seqlens=cu, **pool), *kept]
        accepted = torch.ones(len(q), dtype=torch.bool, device="cuda")
        lightning_attention_commit(k, v, log_decay, state, cu_seqlens=cu, accepted=accepted, **pool)
        return kept

    return run


RUNS = {name: lambda options=options: sequences(**options) for name, options in SEQUENCES.items()}
RUNS |= {
    name + rings: lambda name=name, rings=rings: pools(name, rings)
    for name in ("decode", "prefill", "verify", "commit")
    for rings in ("", ", rings")
}


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_call_has_the_bits_of_the_first(name: str):
    run = RUNS[name]()
    assert_recorded_calls_repeat(run)
