"""Decay schedules against the formulas of the released models, written out."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_attention import decay

# ALiBi slopes from the paper's rule, as numbers: H = 8 halves from 1/2; H = 12 adds every other slope of 16 heads.
ALIBI = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    3: [2**-4, 2**-8, 2**-2],
    8: [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8],
    12: [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    20: [2 ** (-0.5 * (h + 1)) for h in range(16)] + [2**-0.25, 2**-0.75, 2**-1.25, 2**-1.75],
}


def close(actual: Tensor, expected: list[float]) -> bool:
    """To the rounding to float32, whose terms are sums and products of a handful of doubles."""
    assert actual.dtype == torch.float32
    assert actual.shape == (len(expected),)
    return torch.equal(actual, torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize("H", ALIBI)
def test_alibi(H: int):
    assert close(decay.alibi(H), [-s for s in ALIBI[H]])


@pytest.mark.parametrize("H", [64, 32, 40, 5])
def test_alibi_of_any_number_of_heads(H: int):
    power = 2 ** int(math.log2(H))
    first = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    twice = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(2 * power)]
    assert close(decay.alibi(H), [-s for s in (first + twice[0::2])[:H]])


@pytest.mark.parametrize("H", [8, 12, 20])
@pytest.mark.parametrize("L", [2, 24, 80])
def test_schedules_of_the_released_models(H: int, L: int):
    for layer in (0, 1, L // 2, L - 1):
        factors = {
            decay.transnormer: 1 - layer / (L - 1) + 1e-5,
            decay.minimax: 1 - layer / (L - 1 + 1e-5) + 1e-5,
            decay.bailing: 1 - (layer - 1) / (L - 1) + 1e-5,
        }
        for schedule, factor in factors.items():
            expected = torch.tensor([-s * factor for s in ALIBI[H]], dtype=torch.float64).float()
            torch.testing.assert_close(schedule(H, layer, L), expected, rtol=1e-6, atol=0)


def test_first_and_last_layer():
    """TransNormerLLM 385M, 8 heads, 24 layers: from ALiBi to almost none; Bailing goes past ALiBi at the start."""
    first, last = decay.transnormer(8, 0, 24), decay.transnormer(8, 23, 24)
    assert first[0].item() == pytest.approx(-0.5 * 1.00001)
    assert last[0].item() == pytest.approx(-0.5 * 1e-5, rel=1e-4)
    assert decay.bailing(8, 0, 24)[0].item() == pytest.approx(-0.5 * (1 + 1 / 23 + 1e-5))
    assert decay.bailing(8, 23, 24)[0].item() == pytest.approx(-0.5 * (1 / 23 + 1e-5))
    # MiniMax's last layer: 1 − 79 / 79.00001 + 1e-5
    assert decay.minimax(64, 79, 80)[0].item() == pytest.approx(-(2 ** (-1 / 8)) * (1e-5 + 1e-5 / 79.00001), rel=1e-4)


@pytest.mark.parametrize("schedule", [decay.transnormer, decay.minimax, decay.bailing])
def test_a_single_layer(schedule: Callable[[int, int, int], Tensor]):
    got = schedule(8, 0, 1)
    assert got.isfinite().all()
    if schedule is not decay.bailing:
        torch.testing.assert_close(got, decay.alibi(8) * (1 + 1e-5), rtol=1e-6, atol=0)


def test_retnet():
    expected = [math.log(1 - 1 / 32), math.log(1 - 1 / 64), math.log(1 - 1 / 128)]
    torch.testing.assert_close(decay.retnet(3), torch.tensor(expected), rtol=1e-6, atol=0)
    assert decay.retnet(64)[-1].item() == pytest.approx(-(2.0**-68), rel=1e-6)  # 1 − 2^−68 is 1 in float64


@pytest.mark.parametrize("H", [1, 8, 20, 64])
def test_every_head_of_every_layer_forgets(H: int):
    schedules = [decay.alibi(H), decay.retnet(H)]
    for layer in range(6):
        schedules += [s(H, layer, 6) for s in (decay.transnormer, decay.minimax, decay.bailing)]
    for log_decay in schedules:
        assert (log_decay < 0).all()


@pytest.mark.parametrize("H", [0, -1])
def test_no_heads(H: int):
    calls = [lambda: decay.alibi(H), lambda: decay.retnet(H), lambda: decay.transnormer(H, 0, 2)]
    calls += [lambda: decay.minimax(H, 0, 2), lambda: decay.bailing(H, 0, 2)]
    for call in calls:
        with pytest.raises(ValueError, match=f"num_heads is {H}; it must be at least 1"):
            call()


@pytest.mark.parametrize("schedule", [decay.transnormer, decay.minimax, decay.bailing])
def test_layers_that_are_not_there(schedule: Callable[[int, int, int], Tensor]):
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"layer is {layer}; it must be in \[0, 2\)"):
            schedule(8, layer, 2)
    with pytest.raises(ValueError, match="num_layers is 0; it must be at least 1"):
        schedule(8, 0, 0)
