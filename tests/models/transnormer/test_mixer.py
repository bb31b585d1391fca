import itertools

import pytest
import torch
from torch import Tensor

from lightning_attention import decay
from lightning_attention.models.transnormer.mixer import TransnormerMixer
from tests.support.numerics import relative_error

H, WIDTH, EMBED = 3, 24, 16


def make(*, lrpe: bool = True, bias: bool = False) -> TransnormerMixer:
    layer = TransnormerMixer(EMBED, H, decay.transnormer(H, 1, 4), hidden_dim=WIDTH, lrpe=lrpe, bias=bias)
    for p in layer.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.4)
    return layer


def recurrence(layer: TransnormerMixer, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """The layer by its definition, token by token in float64, with gradients."""
    d = WIDTH // H
    q, k, v, u = (x.double() @ layer.qkvu_proj.weight.double().T).chunk(4, -1)
    q, k = (z * torch.sigmoid(z) for z in (q, k))
    q, k, v = (z.unflatten(-1, (H, d)) for z in (q, k, v))
    if layer.lrpe is not None:
        angle = torch.arange(start, start + x.shape[1]).double()[:, None, None] * layer.lrpe.theta.double()[:, 0]
        q, k = (torch.cat([z * angle.cos(), z * angle.sin()], -1) for z in (q, k))
    decays = layer.log_decay.double().exp()[:, None, None]
    state = torch.zeros(x.shape[0], H, q.shape[-1], d, dtype=torch.float64)
    outputs = []
    for t in range(x.shape[1]):
        state = decays * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhd,bhde->bhe", q[:, t], state).flatten(1))
    o = torch.stack(outputs, 1)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + 1e-6)
    return (u * o) @ layer.out_proj.weight.double().T, state


@pytest.mark.parametrize("lrpe", [False, True])
def test_is_the_recurrence_in_value_and_gradient(lrpe: bool) -> None:
    layer, x = make(lrpe=lrpe), torch.randn(2, 70, EMBED, requires_grad=True)
    wanted = [x, *layer.parameters()]
    out, state = layer(x, output_state=True)
    expected, expected_state = recurrence(layer, x)
    assert relative_error(out, expected) <= 2e-6
    assert relative_error(state, expected_state) <= 2e-6
    weight, state_weight = torch.randn_like(out), torch.randn_like(state)
    actual = torch.autograd.grad((out * weight).sum() + (state * state_weight).sum(), wanted)
    exact = torch.autograd.grad((expected * weight).sum() + (expected_state * state_weight).sum(), wanted)
    for a, e in zip(actual, exact, strict=True):
        assert relative_error(a, e) <= 2e-5


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lrpe", [False, True])
def test_pieces_then_steps_equal_the_whole(lrpe: bool, grad: bool) -> None:
    layer, x = make(lrpe=lrpe), torch.randn(2, 1 + 7 + 64 + 1000 + 5, EMBED)
    with torch.set_grad_enabled(grad):
        whole, final = layer(x, output_state=True)
        pieces, state, start = [], None, 0
        for length in (1, 7, 64, 1000):
            stop = start + length
            out, state = layer(x[:, start:stop], state, positions=torch.arange(start, stop), output_state=True)
            pieces.append(out)
            start = stop
    with torch.no_grad():
        state = state.clone()
        for t in range(start, x.shape[1]):
            pieces.append(layer.step(x[:, t], state, positions=torch.full((2,), t)).unsqueeze(1))
    assert relative_error(torch.cat(pieces, 1), whole) <= 1e-5
    assert relative_error(state, final) <= 1e-5


def test_gradients_reach_the_pieces_before() -> None:
    layer, x, weight = make(), torch.randn(1, 60, EMBED, requires_grad=True), torch.randn(1, 30, EMBED)
    (whole,) = torch.autograd.grad((recurrence(layer, x)[0][:, 30:] * weight).sum(), x)
    _, state = layer(x[:, :30], output_state=True)
    out, _ = layer(x[:, 30:], state, positions=torch.arange(30, 60))
    (pieces,) = torch.autograd.grad((out * weight).sum(), x)
    assert relative_error(pieces[:, :30], whole[:, :30]) <= 2e-5
    assert relative_error(pieces[:, 30:], whole[:, 30:]) <= 2e-5


def test_forgetting_the_state_or_the_position_is_noticed() -> None:
    layer, x = make(), torch.randn(1, 40, EMBED)
    whole, _ = layer(x)
    _, state = layer(x[:, :20], output_state=True)
    assert relative_error(layer(x[:, 20:], positions=torch.arange(20, 40))[0], whole[:, 20:]) > 0.05
    assert relative_error(layer(x[:, 20:], state, positions=torch.arange(20))[0], whole[:, 20:]) > 0.05
    with pytest.raises(ValueError, match="positions is None and state is given"):
        layer(x[:, 20:], state)


def test_forward_leaves_the_given_state_alone() -> None:
    layer, state = make(), torch.randn(1, H, 16, 8)
    before = state.clone()
    _, after = layer(torch.randn(1, 1, EMBED), state, positions=torch.tensor([9]), output_state=True)
    assert torch.equal(state, before)
    assert not torch.equal(after, before)


@torch.no_grad()
def test_step_writes_to_the_slots_and_skips_padding() -> None:
    layer, pool, x = make(), torch.randn(5, H, 16, 8), torch.randn(3, EMBED)
    before, positions = pool.clone(), torch.tensor([4, 9, 2])
    out = layer.step(x, pool, positions=positions, slots=torch.tensor([3, -1, 0]))
    for row, slot in ((0, 3), (2, 0)):
        alone, state = layer(
            x[row].view(1, 1, -1), before[slot : slot + 1], positions=positions[row : row + 1], output_state=True
        )
        assert relative_error(out[row], alone[0, 0]) <= 1e-5
        assert relative_error(pool[slot], state[0]) <= 1e-6
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])
    assert torch.equal(out[1], torch.zeros(EMBED))


@torch.no_grad()
@pytest.mark.parametrize("lrpe", [False, True])
def test_prefill_serves_new_and_continued_sequences_and_steps_from_one_pool(lrpe: bool) -> None:
    layer, x = make(lrpe=lrpe), torch.randn(75, EMBED)
    pool = torch.randn(5, *layer.state_shape)
    before, cuts, starts = pool.clone(), [0, 1, 66, 67, 70, 70], [9, 0, 4, 2, 0]  # x[70:] is padding
    slots, fresh = [4, 0, -1, 2, 1], [False, True, False, False, False]
    positions = torch.cat(
        [torch.arange(p, p + b - a) for p, (a, b) in zip(starts, itertools.pairwise(cuts), strict=True)]
    )
    out = layer.prefill(
        x,
        pool,
        cu_seqlens=torch.tensor(cuts),
        positions=torch.nn.functional.pad(positions, (0, 5)),
        slots=torch.tensor(slots),
        fresh=torch.tensor(fresh),
    )
    for (a, b), slot, new in zip(itertools.pairwise(cuts), slots, fresh, strict=True):
        if slot < 0:
            assert torch.equal(out[a:b], torch.zeros(b - a, EMBED))
        elif a < b:
            initial = None if new else before[slot : slot + 1]
            alone, state = layer(x[None, a:b], initial, positions=positions[a:b], output_state=True)
            assert relative_error(out[a:b], alone[0]) <= 1e-5
            assert relative_error(pool[slot], state[0]) <= 1e-5
    assert torch.equal(out[70:], torch.zeros(5, EMBED))
    assert torch.equal(pool[[1, 3]], before[[1, 3]])
    # A sequence of one token gets what a step gives it.
    one = layer.step(x[:1], before, positions=positions[:1], slots=torch.tensor([4]))
    assert relative_error(out[:1], one) <= 1e-5


def test_packed_sequences_do_not_see_each_other() -> None:
    layer, x = make(), torch.randn(1, 100, EMBED)
    cuts = [0, 1, 1, 64, 100]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(cuts)])
    initial = torch.randn(4, H, 16, 8)
    given, _ = layer(x, positions=positions, cu_seqlens=torch.tensor(cuts))
    assert torch.equal(layer(x, cu_seqlens=torch.tensor(cuts))[0], given)
    out, states = layer(x, initial, positions=positions, cu_seqlens=torch.tensor(cuts), output_state=True)
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        if start == stop:
            assert torch.equal(states[i], initial[i])
            continue
        counted = torch.arange(stop - start)
        alone, state = layer(x[:, start:stop], initial[i : i + 1], positions=counted, output_state=True)
        assert relative_error(out[:, start:stop], alone) <= 1e-5
        assert relative_error(states[i], state[0]) <= 1e-5


def test_q_k_v_u_are_not_copied_on_the_way_to_the_operation() -> None:
    layer, x = make(lrpe=False), torch.randn(2, 9, EMBED)
    q, k, v, u = layer._project(x, None)
    assert v.untyped_storage().data_ptr() == u.untyped_storage().data_ptr()
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert q.stride(-1) == v.stride(-1) == 1


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_decay_stays_float32(cast: torch.dtype) -> None:
    layer, expected = make().to(cast), decay.transnormer(H, 1, 4)
    assert torch.equal(layer.log_decay, expected)
    assert layer.log_decay.dtype == torch.float32
    assert layer.qkvu_proj.weight.dtype == cast
    assert "log_decay" not in layer.state_dict()


def test_decay_survives_the_meta_device() -> None:
    layer = make().to("meta")
    assert layer.log_decay.is_meta
    assert torch.equal(layer.to_empty(device="cpu").log_decay, decay.transnormer(H, 1, 4))


def test_bfloat16_is_near_float32() -> None:
    layer, x = make(), torch.randn(2, 200, EMBED)
    expected, _ = recurrence(layer, x)
    out, state = layer.bfloat16()(x.bfloat16(), output_state=True)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(out, expected) <= 2e-2  # eight roundings of 2^-9


def test_bias_is_used() -> None:
    layer, x = make(bias=True), torch.randn(1, 5, EMBED)
    with_bias, _ = layer(x)
    for proj in (layer.qkvu_proj, layer.out_proj):
        torch.nn.init.zeros_(proj.bias)
    assert relative_error(layer(x)[0], recurrence(layer, x)[0]) <= 2e-6
    assert relative_error(layer(x)[0], with_bias) > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_dim": 25}, "hidden_dim is 25; it must be a multiple of num_heads, 3"),
        ({"log_decay": torch.zeros(4)}, r"log_decay is \[4\] torch.float32 on cpu; it must be \[3\]"),
        ({"log_decay": torch.zeros(3).double()}, r"log_decay is \[3\] torch.float64"),
        ({"log_decay": torch.zeros(3, device="meta")}, "on meta; it must be .* with values"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransnormerMixer(**{"embed_dim": 15, "num_heads": H, "log_decay": torch.zeros(H), **arguments})


def test_a_step_with_lrpe_needs_positions() -> None:
    x, state = torch.randn(2, EMBED), torch.zeros(2, H, 16, 8)
    with pytest.raises(ValueError, match=r"positions is None; rope and LRPE need .* \[2\]"):
        make().step(x, state)
    with pytest.raises(ValueError, match=r"positions is None; rope and LRPE need .* \[2\]"):
        make().prefill(x, state, cu_seqlens=torch.tensor([0, 1, 2]))
