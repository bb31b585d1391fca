"""Decay schedules against the formulas of the released models, written out."""

import math
from collections.abc import Callable
from inspect import isfunction, signature

import pytest
import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention, lightning_attention_decode
from lightning_attention.nn import LightningAttention

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


def test_fla_lightning():
    expected = torch.tensor([0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0])
    assert torch.equal(decay.fla_lightning(8, 0, 24), expected)
    torch.testing.assert_close(decay.fla_lightning(8, 18, 24), expected / 4)


# By what decay.py defines, so that a new schedule is one function there.
SCHEDULES = {
    name: schedule
    for name, schedule in vars(decay).items()
    if isfunction(schedule) and schedule.__module__ == decay.__name__ and not name.startswith("_")
}
OF_LAYERS = [schedule for schedule in SCHEDULES.values() if "layer" in signature(schedule).parameters]


def on_every_layer(schedule: Callable[..., Tensor], H: int) -> list[Tensor]:
    return [schedule(H, layer, 6) for layer in range(6)] if schedule in OF_LAYERS else [schedule(H)]


def test_the_schedules_are_found():
    assert SCHEDULES.keys() >= {"alibi", "transnormer", "minimax", "bailing", "retnet", "fla_lightning"}
    assert {schedule.__name__ for schedule in OF_LAYERS} >= {"transnormer", "minimax", "bailing"}


@pytest.mark.parametrize("H", [1, 8, 20, 64])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_head_of_every_layer_forgets(name: str, H: int):
    for log_decay in on_every_layer(SCHEDULES[name], H):
        assert log_decay.shape == (H,)
        assert log_decay.dtype == torch.float32
        forgetting = log_decay[1:] if name == "fla_lightning" else log_decay  # its head 0 never does
        assert (forgetting < 0).all()


@pytest.mark.parametrize("H", [0, -1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_heads(name: str, H: int):
    with pytest.raises(ValueError, match=f"num_heads is {H}; it must be at least 1"):
        on_every_layer(SCHEDULES[name], H)


@pytest.mark.parametrize("schedule", OF_LAYERS)
def test_layers_that_are_not_there(schedule: Callable[[int, int, int], Tensor]):
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"layer is {layer}; it must be in \[0, 2\)"):
            schedule(8, layer, 2)
    with pytest.raises(ValueError, match="num_layers is 0; it must be at least 1"):
        schedule(8, 0, 0)


def halving(num_heads: int) -> Tensor:
    """A toy: head h has a half-life of 2^h tokens."""
    return -math.log(2) * 2.0 ** -torch.arange(num_heads)


@torch.no_grad()
def test_a_toy_schedule_is_one_function():
    """Everything that has decays takes it: the operations, a layer, its steps."""
    log_decay = halving(4)
    k, v = torch.randn(2, 1, 1, 4, 8)
    start = torch.randn(1, 4, 8, 8)
    zeros = torch.zeros(1, 8, 4, 8)
    final = lightning_attention(
        zeros, zeros, zeros, log_decay, initial_state=start, output_final_state=True
    ).final_state
    left = torch.tensor([2.0**-8, 2.0**-4, 2.0**-2, 2.0**-1])  # of a state after eight tokens
    torch.testing.assert_close(final, start * left[:, None, None])
    pool = start.clone()
    lightning_attention_decode(k[0] * 0, k[0] * 0, v[0] * 0, log_decay, pool)
    torch.testing.assert_close(pool[:, 0], start[:, 0] / 2)
    layer = LightningAttention(32, 4, log_decay, head_dim=8)
    x = torch.randn(1, 5, 32)
    whole, state = layer(x, output_state=True)
    pool = torch.zeros_like(state)
    steps = torch.stack([layer.step(x[:, t], pool) for t in range(5)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool, state, rtol=1e-4, atol=1e-5)
