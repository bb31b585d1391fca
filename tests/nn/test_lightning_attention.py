"""The layer against each published model's definition, token by token, and against the MiniMax of transformers."""

import io
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_attention import decay
from lightning_attention.models.transnormer.mixer import TransnormerMixer
from lightning_attention.nn import LightningAttention, rope
from tests.support.numerics import relative_error

H, HIDDEN, D = 4, 32, 8
LAYERS: dict[str, Callable[[], LightningAttention]] = {
    "minimax": lambda: LightningAttention.minimax(HIDDEN, H, layer=1, num_layers=4),
    "bailing": lambda: LightningAttention.bailing(HIDDEN, H, layer=1, num_layers=4, norm_groups=2),
    "minicpm_sala": lambda: LightningAttention.minicpm_sala(HIDDEN, H),
    "retnet": lambda: LightningAttention.retnet(HIDDEN, H),
    "retnet of fla": lambda: LightningAttention.retnet(HIDDEN, H, value_dim=D, rope_base=10000.0, norm_weight=True),
    "transnormer": lambda: LightningAttention.transnormer(HIDDEN, H, layer=0, num_layers=4),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str) -> LightningAttention:
    """With weights of a size that makes every part of the layer matter."""
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.ndim == 1, std=0.3)
    return layer


def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor, dim: int, base: float) -> Tensor:
    """[B, T, H, d] as complex numbers turned by their position, channel i with channel i + dim/2."""
    angle = torch.arange(x.shape[1]).double()[:, None] * base ** (-torch.arange(0, dim, 2).double() / dim)
    pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 : dim])
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag, x[..., dim:]], -1)


def recurrence(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    state, outputs = torch.zeros(q.shape[0], H, q.shape[-1], v.shape[-1]).double(), []
    for t in range(q.shape[1]):
        state = torch.exp(-slopes)[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return torch.stack(outputs, 1), state


def definition(name: str, layer: LightningAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the model's authors write, in float64: nothing here looks at how the layer is configured."""
    w = {key: value.double() for key, value in layer.named_parameters()}
    x, E = x.double(), 2 * D if name == "retnet" else D
    q, k, v = (z.unflatten(-1, (H, -1)) for z in (x @ w["qkv_proj.weight"].T).split([H * D, H * D, H * E], -1))
    u = x @ w["gate_proj.weight"].T
    alibi = 2.0 ** (-2.0 * torch.arange(1, H + 1).double())
    scale = D**-0.5
    if name == "minimax":
        q, k, v = (z * torch.sigmoid(z) for z in (q, k, v))
        o, state = recurrence(q, k, v, alibi * (1 - 1 / (3 + 1e-5) + 1e-5), 1.0)
        o = rms(o.flatten(-2), w["norm.weight"]) * torch.sigmoid(u)
    elif name == "bailing":
        q, k = (rotated(rms(z, w[f"{n}_norm.weight"]), D // 2, 600000.0) for n, z in (("q", q), ("k", k)))
        o, state = recurrence(q, k, v, alibi * (1 - 0 / 3 + 1e-5), scale)
        groups = [rms(group) for group in o.flatten(-2).split(H * D // 2, -1)]
        o = torch.cat(groups, -1) * w["norm.weight"] * torch.sigmoid(u)
    elif name == "minicpm_sala":
        q, k = (rotated(rms(z, w[f"{n}_norm.weight"]), D, 10000.0) for n, z in (("q", q), ("k", k)))
        o, state = recurrence(q, k, v, alibi, scale)
        o = rms(o.flatten(-2), w["norm.weight"]) * torch.sigmoid(u)
    elif name == "retnet":
        # The authors' rotation: neighbouring channels in pairs, frequencies from 1 to 1/10000 with both ends.
        theta = 10000.0 ** -torch.linspace(0, 1, D // 2).double()
        pairs = torch.arange(D).view(2, D // 2).T.flatten()
        angle = torch.arange(x.shape[1]).double()[:, None] * theta
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, k = (torch.view_as_complex(z[..., pairs].unflatten(-1, (-1, 2)).contiguous()) * turn for z in (q, k))
        q, k = (torch.view_as_real(z).flatten(-2)[..., pairs.argsort()] for z in (q, k))
        o, state = recurrence(q, k, v, -torch.log(1 - 2.0 ** (-5 - torch.arange(H).double())), scale)
        o = rms(o).flatten(-2) * u * torch.sigmoid(u)
    elif name == "retnet of fla":
        q, k = (rotated(z, D, 10000.0) for z in (q, k))
        o, state = recurrence(q, k, v, -torch.log(1 - 2.0 ** (-5 - torch.arange(H).double())), scale)
        o = rms(o).flatten(-2) * w["norm.weight"] * u * torch.sigmoid(u)
    else:
        q, k = (z * torch.sigmoid(z) for z in (q, k))
        angle = torch.arange(x.shape[1]).double()[:, None, None] * w["lrpe.theta"][:, 0]
        q, k = (torch.cat([z * angle.cos(), z * angle.sin()], -1) for z in (q, k))
        o, state = recurrence(q, k, v, alibi * (1 + 1e-5), 1.0)
        o = rms(o.flatten(-2)) * u
    return o @ w["out_proj.weight"].T, state


@every_layer
def test_is_what_the_authors_define_in_value_and_gradient(name: str):
    layer, x = make(name), torch.randn(2, 70, HIDDEN, requires_grad=True)
    out, state = layer(x, output_state=True)
    expected, expected_state = definition(name, layer, x)
    assert tuple(state.shape[1:]) == layer.state_shape
    assert relative_error(out, expected) <= 3e-6
    assert relative_error(state, expected_state) <= 3e-6
    weight, state_weight = torch.randn_like(out), torch.randn_like(state)
    wanted = [x, *layer.parameters()]
    actual = torch.autograd.grad((out * weight).sum() + (state * state_weight).sum(), wanted)
    exact = torch.autograd.grad((expected * weight).sum() + (expected_state * state_weight).sum(), wanted)
    for a, e in zip(actual, exact, strict=True):
        assert relative_error(a, e) <= 3e-5


@pytest.mark.parametrize(("name", "other"), [*itertools.permutations(sorted({*LAYERS} - {"retnet"}), 2)])
def test_no_two_models_are_taken_for_each_other(name: str, other: str):
    """The definitions differ, so agreeing with one is disagreeing with the rest (retnet's has other shapes)."""
    layer, x = make(name), torch.randn(1, 40, HIDDEN)
    foreign = make(other)
    foreign.load_state_dict(layer.state_dict(), strict=False)
    assert relative_error(foreign(x)[0], definition(name, layer, x)[0]) > 1e-2


def gradients(module: torch.nn.Module, out: Tensor, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    wanted = {"x": x, **dict(module.named_parameters())}
    return dict(zip(wanted, torch.autograd.grad((out * weight).sum(), list(wanted.values())), strict=True))


@pytest.mark.parametrize("layer_index", [0, 3])
def test_minimax_is_the_module_of_transformers(layer_index: int):
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    from transformers import MiniMaxConfig

    config = MiniMaxConfig(
        hidden_size=HIDDEN, num_attention_heads=H, head_dim=D, num_hidden_layers=4, block_size=16,
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    theirs = modeling.MiniMaxLightningAttention(config, layer_index)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.ndim == 1, std=0.3)
    ours = LightningAttention.minimax(HIDDEN, H, head_dim=D, layer=layer_index, num_layers=4)

    def copied(name: str, x: Tensor) -> Tensor:
        """Theirs hold q, k and v of each head together, ours those of all heads."""
        return x.view(H, 3, D, HIDDEN).transpose(0, 1).reshape(-1, HIDDEN) if name == "qkv_proj.weight" else x

    names = {"output_gate.weight": "gate_proj.weight"}
    ours.load_state_dict({names.get(n, n): copied(n, p.detach()) for n, p in theirs.named_parameters()})

    x, weight = torch.randn(2, 50, HIDDEN, requires_grad=True), torch.randn(2, 50, HIDDEN)
    cache = modeling.MiniMaxCache()
    expected, expected_state = theirs(x, position_embeddings=None, attention_mask=None)
    out, state = ours(x, output_state=True)
    assert relative_error(out, expected) <= 1e-5
    assert relative_error(state, expected_state) <= 1e-5
    theirs_grads = gradients(theirs, expected, x, weight)
    ours_grads = gradients(ours, out, x, weight)
    for name, gradient in theirs_grads.items():
        assert relative_error(ours_grads[names.get(name, name)], copied(name, gradient)) <= 1e-5, name

    with torch.no_grad():  # and token by token after a prompt
        theirs(x[:, :40], None, None, cache)
        state = ours(x[:, :40], output_state=True)[1]
        for t in range(40, 43):
            expected, _ = theirs(x[:, t : t + 1], None, None, cache)
            assert relative_error(ours.step(x[:, t], state), expected[:, 0]) <= 1e-5


def test_transnormer_is_gated_linear_attention():
    for layer in (0, 1):
        ours = LightningAttention.transnormer(HIDDEN, H, layer=layer, num_layers=4)
        theirs = TransnormerMixer(HIDDEN, H, decay.transnormer(H, layer, 4), lrpe=layer == 0)
        weights = dict(ours.state_dict())
        weights["qkvu_proj.weight"] = torch.cat([weights.pop("qkv_proj.weight"), weights.pop("gate_proj.weight")])
        theirs.load_state_dict(weights)
        x = torch.randn(2, 30, HIDDEN)
        assert relative_error(ours(x)[0], theirs(x)[0]) <= 1e-6


def test_rope_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    q, k, positions = torch.randn(2, 9, H, D), torch.randn(2, 9, H, D), torch.randint(0, 5000, (2, 9))
    angles = positions[..., None] * 500.0 ** (-torch.arange(0, D, 2) / D)
    expected = modeling.apply_rotary_pos_emb(
        q, k, torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin(), unsqueeze_dim=2
    )
    for x, e in zip((q, k), expected, strict=True):
        assert relative_error(rope(x, positions, base=500.0), e) <= 1e-6
    part = rope(q, positions, dim=4)
    assert torch.equal(part[..., 4:], q[..., 4:])
    assert torch.equal(part[..., :4], rope(q[..., :4], positions))


@every_layer
def test_pieces_then_steps_equal_the_whole(name: str):
    layer, x = make(name), torch.randn(2, 1 + 7 + 64 + 200 + 4, HIDDEN)
    with torch.no_grad():
        whole, final = layer(x, output_state=True)
        pieces, state, start = [], None, 0
        for stop in (1, 8, 72, 272):
            out, state = layer(x[:, start:stop], state, positions=torch.arange(start, stop), output_state=True)
            pieces.append(out)
            start = stop
        for t in range(start, x.shape[1]):
            pieces.append(layer.step(x[:, t], state, positions=torch.full((2,), t)).unsqueeze(1))
    assert relative_error(torch.cat(pieces, 1), whole) <= 1e-5
    assert relative_error(state, final) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@every_layer
def test_packed_sequences_are_each_alone(name: str, dtype: torch.dtype):
    layer, x = make(name), torch.randn(1, 105, HIDDEN)
    cuts = [0, 1, 1, 64, 100]
    out, states = layer(x, cu_seqlens=torch.tensor(cuts, dtype=dtype), output_state=True)
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        if start < stop:
            alone, state = layer(x[:, start:stop], output_state=True)
            assert relative_error(out[:, start:stop], alone) <= 1e-5
            assert relative_error(states[i], state[0]) <= 1e-5
    assert not out[:, 100:].any()


@every_layer
@torch.no_grad()
def test_prefill_and_step_use_rows_of_a_pool(name: str):
    layer, x = make(name), torch.randn(1, 90, HIDDEN)
    whole, final = layer(x, output_state=True)
    pool = torch.full((4, *layer.state_shape), float("nan"))
    # A chunk of 50, beside a padding sequence, then 39 more beside a new sequence of 3, then one token.
    slots = torch.tensor([2, -1])
    first = layer.prefill(
        x[0, :53], pool, cu_seqlens=torch.tensor([0, 50, 53]), positions=torch.arange(53), slots=slots,
        fresh=torch.tensor([True, True]),
    )  # fmt: skip
    both = torch.cat([x[0, 50:89], x[0, :3]])
    positions = torch.cat([torch.arange(50, 89), torch.arange(3)])
    second = layer.prefill(
        both, pool, cu_seqlens=torch.tensor([0, 39, 42]), positions=positions, slots=torch.tensor([2, 0]),
        fresh=torch.tensor([False, True]),
    )  # fmt: skip
    last = layer.step(x[:, 89], pool, positions=torch.tensor([89]), slots=torch.tensor([2]))
    assert relative_error(torch.cat([first[:50], second[:39], last]), whole[0]) <= 1e-5
    assert relative_error(second[39:], whole[0, :3]) <= 1e-5
    assert relative_error(pool[2], final[0]) <= 1e-5
    assert not first[50:].any()
    assert pool[[1, 3]].isnan().all()


@pytest.mark.parametrize("name", ["bailing", "minicpm_sala", "retnet", "transnormer"])
def test_positions_may_not_be_forgotten(name: str):
    layer, x = make(name), torch.randn(2, 3, HIDDEN)
    state = layer(x, output_state=True)[1].detach()
    with pytest.raises(ValueError, match="positions is None and state is given"):
        layer(x, state)
    with pytest.raises(ValueError, match=r"positions is None; rope and LRPE need .* \[2\]"):
        layer.step(x[:, 0], state)
    with pytest.raises(ValueError, match=r"positions is None; rope and LRPE need .* \[2\]"):
        layer.verify(x[:, 0], state, cu_seqlens=torch.tensor([0, 1, 2]))
    # One position for all would be broadcast.
    with pytest.raises(ValueError, match=r"positions is \[1\]; it must be \[3\] or \[2, 3\]"):
        layer(x, state, positions=torch.tensor([5]))
    with pytest.raises(ValueError, match=r"positions is \[1\]; rope and LRPE need .* \[2\]"):
        layer.step(x[:, 0], state, positions=torch.tensor([5]))


@every_layer
def test_half_precision_and_autocast_are_near_float32(name: str):
    layer, x = make(name), torch.randn(2, 100, HIDDEN)
    expected = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = layer(x, output_state=True)
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(out, expected) <= 3e-2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    half = layer.bfloat16()
    assert half.log_decay.dtype == torch.float32
    assert torch.equal(half.log_decay, LAYERS[name]().log_decay)
    out, state = half(x.bfloat16(), output_state=True)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) <= 3e-2


@pytest.mark.parametrize("name", ["bailing", "transnormer"])
def test_compiled_in_one_graph(name: str):
    layer, x = make(name), torch.randn(2, 20, HIDDEN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out, _ = compiled(x)
    actual = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= 1e-5


def test_checkpointing_saving_and_loading():
    layer, x = make("bailing"), torch.randn(2, 20, HIDDEN)
    out = checkpoint(lambda y: layer(y)[0], x, use_reentrant=False)
    recomputed = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    assert all(torch.equal(a, e) for a, e in zip(recomputed, expected, strict=True))

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = LAYERS["bailing"]().to("meta").to_empty(device="cpu")
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "hidden_size is 32; it must be a multiple of num_heads, 3"),
        ({"num_heads": 0}, "hidden_size is 32; it must be a multiple of num_heads, 0"),
        ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ({"value_dim": 0}, "value_dim is 0; it must be at least 1"),
        ({"log_decay": torch.zeros(3)}, r"log_decay is \[3\] torch.float32 on cpu; it must be \[4\]"),
        ({"silu": "kv"}, "silu is 'kv'; it must be '', 'qk' or 'qkv'"),
        ({"gate": "tanh"}, "gate is 'tanh'; it must be one of sigmoid, silu, linear"),
        ({"rope_dim": 3}, "rope_dim is 3; it must be even and from 0 to head_dim, 8"),
        ({"rope_dim": 10}, "rope_dim is 10; it must be even and from 0 to head_dim, 8"),
        ({"rope_dim": 4, "lrpe": True}, "rope_dim is 4 and lrpe is True; a layer has one position encoding"),
        ({"norm_groups": 5}, r"norm_groups is 5; it must divide H · value_dim, 32"),
    ],
)
def test_refuses(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LightningAttention(**{"hidden_size": HIDDEN, "num_heads": H, "log_decay": torch.zeros(H), **arguments})


def test_learns_to_recall_a_token_seen_long_before():
    """A task that needs the state: the answer is the first token, 24 tokens back, with nothing of it in between."""
    embed, layer, head = torch.nn.Embedding(8, HIDDEN), make("minicpm_sala"), torch.nn.Linear(HIDDEN, 8)
    optimizer = torch.optim.Adam([*embed.parameters(), *layer.parameters(), *head.parameters()], 1e-2)
    for _ in range(40):
        ids = torch.zeros(32, 25, dtype=torch.long)
        ids[:, 0] = torch.randint(1, 8, (32,))
        loss = F.cross_entropy(head(layer(embed(ids))[0][:, -1]), ids[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # guessing gives log 7 = 1.95


@every_layer
def test_in_float64(name: str) -> None:
    """Steps and prefill on states in float64, which a CPU has."""
    layer = LAYERS[name]().double()
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    wanted, final = layer(x, output_state=True)
    assert final is not None
    assert final.dtype == torch.float64
    stepped, prefilled = torch.zeros(2, 2, *layer.state_shape, dtype=torch.float64)
    with torch.no_grad():
        steps = [layer.step(x[:, t], stepped, positions=torch.full((2,), t)) for t in range(9)]
        found = layer.prefill(
            x.flatten(0, 1), prefilled, cu_seqlens=torch.tensor([0, 9, 18]), positions=torch.arange(9).repeat(2)
        )
    assert relative_error(found.view(2, 9, HIDDEN), wanted) <= 1e-13
    assert relative_error(prefilled, final) <= 1e-13
    assert relative_error(torch.stack(steps, 1), wanted) <= 1e-6
    assert relative_error(stepped, final) <= 1e-6
