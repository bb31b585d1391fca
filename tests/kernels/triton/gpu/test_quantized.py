"""Pools in 8 bits on a GPU: rows as plain PyTorch's, and a prefill captured and replayed."""

import pytest
import torch
from torch import Tensor

from lightning_attention import QuantizedStates, decay, lightning_attention_prefill
from tests.kernels.triton.support.device import DEVICE, needs_gpu, no_waiting
from tests.support import ReferencePool, budget, cumulative, relative_error

pytestmark = needs_gpu


@pytest.mark.parametrize(("D", "E"), [(128, 128), (64, 80), (20, 130), (256, 256), (5, 3)])
def test_rows(D: int, E: int):
    """Written on the GPU as on the CPU, but for halves that are rounded the other way; NaN and inf stay visible."""
    torch.manual_seed(0)
    states, slots = torch.randn(5, 3, D, E), torch.tensor([2, -1, 0, 4, 5])
    states[0, 0] *= 1e-40
    states[2, 1, 0, 0], states[2, 1, 1, 1] = torch.inf, torch.nan
    found: list[list[Tensor]] = []
    for device in ("cpu", DEVICE):
        pool = QuantizedStates.empty(7, 3, D, E, device=device)
        pool.quantize(states.to(device), slots.to(device))
        found.append([x.cpu() for x in (pool.high, pool.low, pool.dequantize(slots.to(device)), pool.dequantize())])
    for a, b in zip(*found, strict=True):
        if a.dtype == torch.int8:
            assert (a != b).float().mean() <= 1e-3
        else:
            assert torch.equal(a.isfinite(), b.isfinite())
            assert relative_error(torch.where(b.isfinite(), b, 0), torch.where(a.isfinite(), a, 0)) <= 1e-5
    assert (~found[1][3].isfinite()).sum() == 2 * D


def test_a_captured_prefill_replayed():
    """With other lengths, slots and snapshots each time."""
    torch.manual_seed(0)
    S, H, D, T, N = 9, 4, 128, 300, 3
    states, log_decay = torch.randn(S, H, D, D), decay.alibi(H)
    pool, reference = QuantizedStates.empty(S, H, D, D, device=DEVICE), ReferencePool(states, log_decay)
    pool.quantize(states.to(DEVICE))
    q, k, v = torch.zeros(3, T, H, D, device=DEVICE, dtype=torch.bfloat16)
    cuts, slots = torch.zeros(N + 1, device=DEVICE, dtype=torch.int32), torch.full((N,), -1, device=DEVICE)
    fresh, at, to = torch.zeros(N, device=DEVICE, dtype=torch.bool), *torch.full((2, N, 1), -1, device=DEVICE)
    rate = log_decay.to(DEVICE)

    def call() -> Tensor:
        return lightning_attention_prefill(
            q, k, v, rate, pool, cu_seqlens=cuts, slots=slots, fresh=fresh, snapshot_at=at, snapshot_slots=to
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for lengths in ([100, 1, 150], [0, 290, 3], [64, 64, 64]):
        rows = torch.randperm(S).tolist()
        new, owned, starts = torch.randn(3, T, H, D).bfloat16(), [rows[0], -1, rows[1]], [False, False, True]
        marks, targets = [lengths[0] // 2, 0, lengths[2] + 1], [rows[2], rows[3], rows[4]]
        for x, values in (
            (q, new[0]), (k, new[1]), (v, new[2]), (cuts, cumulative(lengths)), (slots, torch.tensor(owned)),
            (fresh, torch.tensor(starts)), (at, torch.tensor(marks)[:, None]), (to, torch.tensor(targets)[:, None]),
        ):  # fmt: skip
            x.copy_(values)
        graph.replay()
        used = sum(lengths)
        pairs = [[(mark, target)] for mark, target in zip(marks, targets, strict=True)]
        expected = reference.prefill(*(x[:used] for x in new), lengths, owned, starts, pairs)
        assert relative_error(out[:used].cpu(), expected) <= budget(torch.bfloat16)
        assert relative_error(pool.dequantize().cpu(), reference.stacked()) <= budget(torch.bfloat16)
    with no_waiting():
        call()
        pool.dequantize(slots)
