"""Drafts, snapshots and pools, of every layer: each is what reading the tokens one by one gives."""

import copy
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_attention import decay
from lightning_attention.models.transnormer.mixer import TransnormerMixer
from lightning_attention.nn import LightningAttention
from tests.support.numerics import relative_error

Layer = TransnormerMixer | LightningAttention

H, HIDDEN = 4, 32
LAYERS: dict[str, Callable[[], Layer]] = {
    "minimax": lambda: LightningAttention.minimax(HIDDEN, H, layer=1, num_layers=4),
    "bailing": lambda: LightningAttention.bailing(HIDDEN, H, layer=1, num_layers=4, norm_groups=2),
    "minicpm_sala": lambda: LightningAttention.minicpm_sala(HIDDEN, H),
    "retnet": lambda: LightningAttention.retnet(HIDDEN, H),
    "transnormer": lambda: LightningAttention.transnormer(HIDDEN, H, layer=0, num_layers=4),
    "transnormer, without LRPE": lambda: LightningAttention.transnormer(HIDDEN, H, layer=1, num_layers=4),
    "gated": lambda: TransnormerMixer(HIDDEN, H, decay.alibi(H)),
    "gated, with LRPE": lambda: TransnormerMixer(HIDDEN, H, decay.alibi(H), lrpe=True),
}
ENCODED = ["bailing", "minicpm_sala", "retnet", "transnormer", "gated, with LRPE"]
every_layer = pytest.mark.parametrize("name", LAYERS)
BUDGET = 1e-5


@pytest.fixture
def layer(name: str) -> Layer:
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.ndim == 1, std=0.3)
    return layer.requires_grad_(False)


def alone(layer: Layer, tokens: Tensor, state: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The tokens [T, width] from position ``start`` after a state [H, D, E]: one by one, by ``forward`` in float64."""
    exact, state, outputs = copy.deepcopy(layer).double(), state[None].double(), []
    for t, token in enumerate(tokens.double()):
        positions = torch.tensor([start + t])
        out, after = exact(token[None, None], state, positions=positions, output_state=True)
        assert after is not None
        outputs.append(out[0, 0])
        state = after
    return torch.stack(outputs) if outputs else tokens.double(), state[0]


def paths(parents: Sequence[int]) -> list[list[int]]:
    """For each draft, its ancestors and itself, from the root."""
    found: list[list[int]] = []
    for draft, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), draft])
    return found


#: For each sequence: tokens before its drafts, the row it owns (−1: padding), parents of its drafts, the accepted path.
CHAIN = [
    (9, 3, [-1, 0, 1, 2], [0, 1]),
    (0, 0, [-1], []),
    (200, -1, [-1, 0], [0]),
    (70, 5, [], []),
    (4, 1, [-1, 0, 1], [0, 1, 2]),
]
TREE = [
    (9, 3, [-1, -1, 1, 1, 2, 0], [1, 2, 4]),
    (0, 0, [-1, -1, -1], [2]),
    (200, -1, [-1, -1, 0], [0]),
    (70, 5, [], []),
    (4, 1, [-1, 0, 0, 2], []),
]


@pytest.mark.parametrize("shape", ["chain", "tree"])
@every_layer
def test_drafts_get_what_reading_them_gives(layer: Layer, shape: str):
    sequences = CHAIN if shape == "chain" else TREE
    pool, padding = torch.randn(6, *layer.state_shape), 3
    before = pool.clone()
    lengths = [len(parents) for _, _, parents, _ in sequences]
    cuts = [0, *itertools.accumulate(lengths)]
    x = torch.randn(cuts[-1] + padding, HIDDEN)
    depths = [len(path) - 1 for _, _, parents, _ in sequences for path in paths(parents)]
    starts = [start for start, _, parents, _ in sequences for _ in parents]
    positions = torch.tensor([a + b for a, b in zip(starts, depths, strict=True)] + [0] * padding)
    batch = {"cu_seqlens": torch.tensor(cuts), "slots": torch.tensor([slot for _, slot, _, _ in sequences])}
    if shape == "tree":
        batch["parents"] = torch.tensor([p for _, _, parents, _ in sequences for p in parents] + [-1] * padding)

    out, k, v = layer.verify(x, pool, positions=positions, **batch)
    assert torch.equal(pool, before)
    assert not out[cuts[-1] :].any()
    accepted = torch.zeros(len(x), dtype=torch.bool)
    for first, (_, _, _, path) in zip(cuts, sequences, strict=False):
        accepted[[first + draft for draft in path]] = True
    layer.commit(k, v, pool, accepted=accepted, **batch)

    for first, (start, slot, parents, path) in zip(cuts, sequences, strict=False):
        drafts = x[first : first + len(parents)]
        if slot < 0:
            assert not out[first : first + len(parents)].any()
            continue
        for draft, way in enumerate(paths(parents)):
            expected, _ = alone(layer, drafts[way], before[slot], start)
            assert relative_error(out[first + draft], expected[-1]) <= BUDGET
        _, state = alone(layer, drafts[path], before[slot], start)
        assert relative_error(pool[slot], state) <= BUDGET
    assert torch.equal(pool[[2, 4, 5]], before[[2, 4, 5]])


@pytest.mark.parametrize("name", ["minimax", "gated"])
def test_a_path_with_a_hole_is_refused(layer: Layer):
    pool, x = torch.randn(1, *layer.state_shape), torch.randn(3, HIDDEN)
    tree = {"cu_seqlens": torch.tensor([0, 3]), "parents": torch.tensor([-1, -1, 0])}
    _, k, v = layer.verify(x, pool, **tree)
    with pytest.raises(ValueError, match=r"accepted\[2\] is True; draft 2 of its sequence follows draft 0"):
        layer.commit(k, v, pool, accepted=torch.tensor([False, True, True]), **tree)


@pytest.mark.parametrize("name", ENCODED)
def test_siblings_at_different_positions_are_wrong(layer: Layer):
    pool, x = torch.randn(1, *layer.state_shape), torch.randn(2, HIDDEN)
    batch = {"cu_seqlens": torch.tensor([0, 2]), "parents": torch.tensor([-1, -1])}
    right = layer.verify(x, pool, positions=torch.tensor([9, 9]), **batch)[0]
    wrong = layer.verify(x, pool, positions=torch.tensor([9, 10]), **batch)[0]
    assert relative_error(right[1], alone(layer, x[1:], pool[0], 9)[0][0]) <= BUDGET
    assert relative_error(wrong[1], right[1]) > 1e-3


@every_layer
def test_a_prefill_takes_snapshots_from_which_others_go_on(layer: Layer):
    pool, x = torch.full((6, *layer.state_shape), torch.nan), torch.randn(90, HIDDEN)
    nothing = torch.zeros(layer.state_shape)
    # A new prompt of 90 is kept after 64 tokens and after none; the second sequence is padding.
    layer.prefill(
        torch.cat([x, x[:5]]),
        pool,
        cu_seqlens=torch.tensor([0, 90, 95]),
        positions=torch.arange(95),
        slots=torch.tensor([1, -1]),
        fresh=torch.tensor([True, True]),
        snapshot_at=torch.tensor([[64, 0], [3, 3]]),
        snapshot_slots=torch.tensor([[4, 2], [5, -1]]),
    )
    whole, final = alone(layer, x, nothing, 0)
    assert relative_error(pool[1], final) <= BUDGET
    assert relative_error(pool[4], alone(layer, x[:64], nothing, 0)[1]) <= BUDGET
    assert not pool[2].any()
    assert pool[[0, 3, 5]].isnan().all()
    # A hit: the row is copied, and the rest of the prompt read after it.
    pool[3] = pool[4]
    rest = layer.prefill(
        x[64:], pool, cu_seqlens=torch.tensor([0, 26]), positions=torch.arange(64, 90), slots=torch.tensor([3])
    )
    assert relative_error(rest, whole[64:]) <= BUDGET
    assert relative_error(pool[3], final) <= BUDGET


@every_layer
def test_rings_of_recent_tokens_change_nothing(layer: Layer):
    """A prompt, steps, drafts and a chunk: all of a layer's ways to read, over a pool with rings."""
    x, nothing, slots = torch.randn(40, HIDDEN), torch.zeros(layer.state_shape), torch.tensor([2])
    expected, final = alone(layer, x, nothing, 0)
    pool, recent = torch.full((3, *layer.state_shape), torch.nan), layer.allocate_recent(3, 5)
    where = {"slots": slots, "recent": recent}
    out = [layer.prefill(x[:9], pool, cu_seqlens=torch.tensor([0, 9]), positions=torch.arange(9),
                         fresh=torch.tensor([True]), **where)]  # fmt: skip
    out += [layer.step(x[t : t + 1], pool, positions=torch.tensor([t]), **where) for t in range(9, 27)]
    packed = {"cu_seqlens": torch.tensor([0, 3]), **where}
    drafts, k, v = layer.verify(x[27:30], pool, positions=torch.arange(27, 30), **packed)
    layer.commit(k, v, pool, accepted=torch.tensor([True, True, False]), **packed)
    out += [drafts[:2], layer.step(x[29:30], pool, positions=torch.tensor([29]), **where)]
    assert recent.count[2]
    out.append(layer.prefill(x[30:], pool, cu_seqlens=torch.tensor([0, 10]), positions=torch.arange(30, 40), **where))
    assert relative_error(torch.cat(out), expected) <= BUDGET
    assert relative_error(pool[2], final) <= BUDGET
    assert not recent.count.any()


@pytest.mark.parametrize("name", ["bailing"])
def test_commit_takes_what_verify_made_under_autocast(layer: Layer):
    pool, x = torch.randn(2, *layer.state_shape), torch.randn(3, HIDDEN)
    stepped = pool.clone()
    with torch.autocast("cpu", torch.bfloat16):
        batch = {"cu_seqlens": torch.tensor([0, 3]), "slots": torch.tensor([1])}
        out, k, v = layer.verify(x, pool, positions=torch.arange(5, 8), **batch)
        layer.commit(k, v, pool, accepted=torch.tensor([True, True, False]), **batch)
        for t in range(2):
            layer.step(x[t : t + 1], stepped, positions=torch.tensor([5 + t]), slots=torch.tensor([1]))
    assert out.dtype == k.dtype == v.dtype == torch.bfloat16
    assert relative_error(pool, stepped) <= BUDGET


@every_layer
def test_float64_layers_step_prefill_and_verify(layer: Layer):
    x, nothing = torch.randn(20, HIDDEN), torch.zeros(layer.state_shape)
    expected, final = alone(layer, x, nothing, 0)
    layer = layer.double()
    x, pool = x.double(), torch.zeros(1, *layer.state_shape, dtype=torch.float64)
    first = layer.prefill(x[:15], pool, cu_seqlens=torch.tensor([0, 15]), positions=torch.arange(15))
    steps = [layer.step(x[t : t + 1], pool, positions=torch.tensor([t])) for t in (15, 16)]
    batch = {"cu_seqlens": torch.tensor([0, 3])}
    drafts, k, v = layer.verify(x[17:], pool, positions=torch.arange(17, 20), **batch)
    layer.commit(k, v, pool, accepted=torch.ones(3, dtype=torch.bool), **batch)
    assert relative_error(torch.cat([first, *steps, drafts]), expected) <= 1e-12
    assert relative_error(pool[0], final) <= 1e-12


def reads(layer: Layer, how: str, **given) -> Callable[[], object]:
    """A call of one of the layer's ways to read, right but for what is given."""
    pool, cuts = torch.zeros(5, *layer.state_shape), torch.tensor([0, 5])
    arguments = {
        "forward": {"x": torch.zeros(1, 5, HIDDEN), "cu_seqlens": cuts, "positions": torch.arange(5)},
        "step": {"x": torch.zeros(5, HIDDEN), "state": pool, "positions": torch.arange(5)},
        "prefill": {"x": torch.zeros(5, HIDDEN), "state": pool, "cu_seqlens": cuts, "positions": torch.arange(5)},
        "verify": {"x": torch.zeros(5, HIDDEN), "state": pool, "cu_seqlens": cuts, "positions": torch.arange(5)},
    }[how]
    if how in ("prefill", "verify"):
        arguments["slots"] = torch.tensor([2])
    return lambda: getattr(layer, how)(**{**arguments, **given})


WAYS = ["forward", "step", "prefill", "verify"]
WRONG = [
    *((how, {"x": [[0.0] * HIDDEN]}, TypeError, "x is a list; it must be a tensor") for how in WAYS),
    *((how, {"x": torch.zeros(HIDDEN)}, ValueError, rf"x is \[32\]; it must be \[.*, {HIDDEN}\]") for how in WAYS),
    ("forward", {"x": torch.zeros(5, HIDDEN)}, ValueError, r"x is \[5, 32\]; it must be \[B, T, 32\]"),
    ("forward", {"x": torch.zeros(1, 5, 31)}, ValueError, r"x is \[1, 5, 31\]; it must be \[B, T, 32\]"),
    ("step", {"x": torch.zeros(1, 5, HIDDEN)}, ValueError, r"x is \[1, 5, 32\]; it must be \[N, 32\]"),
    ("prefill", {"x": torch.zeros(1, 5, HIDDEN)}, ValueError, r"x is \[1, 5, 32\]; it must be \[T, 32\]"),
    *((how, {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens is a list; it must be a tensor") for how in WAYS[::2]),
    ("verify", {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens is a list; it must be a tensor"),
]


@pytest.mark.parametrize(("how", "given", "error", "message"), WRONG)
@pytest.mark.parametrize("name", ["minimax", "bailing", "gated, with LRPE"])
def test_an_argument_that_is_wrong_is_named(layer: Layer, how: str, given: dict, error: type[Exception], message: str):
    reads(layer, how)()
    with pytest.raises(error, match=f"^{message}"):
        reads(layer, how, **given)()


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("how", WAYS)
def test_positions_that_are_no_tensor_are_named(layer: Layer, how: str):
    with pytest.raises(TypeError, match=r"^positions is a list; it must be a tensor"):
        reads(layer, how, positions=list(range(5)))()
