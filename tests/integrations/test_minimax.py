"""The numbers: transformers' MiniMax with our attention against the same model without."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_attention import decay
from lightning_attention.integrations.minimax import LightningMiniMaxCache, apply_lightning_attention
from lightning_attention.models.arguments import CACHE
from tests.integrations.conftest import LAYOUTS, build
from tests.support import relative_error

minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")

EXACT = 1e-5


def gradients(model, ids, mask=None):
    labels = ids
    if mask is not None:  # padding predicts nothing: its gradient is then zero, where else it grows 1e5-fold a layer
        labels = torch.where(mask.bool() & mask.roll(1, 1).bool(), ids, -100)
    model.zero_grad()
    model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def compare_gradients(original, ours, ids, mask=None):
    wanted, found = gradients(original, ids, mask), gradients(ours, ids, mask)
    assert wanted.keys() == found.keys()
    # All as one vector: a router's own gradient is a difference, which float32 leaves with fewer digits.
    assert relative_error(*(torch.cat([g.flatten() for g in x.values()]) for x in (found, wanted))) < EXACT
    for name, grad in wanted.items():
        assert relative_error(found[name], grad) < 10 * EXACT, name


def chunks(model, ids, lengths, **kwargs):
    """Logits of the pieces, one call each, on one cache."""
    cache, logits = None, []
    with torch.no_grad():
        for piece in ids.split(lengths, 1):
            out = model(piece, **{CACHE: cache}, use_cache=True, **kwargs)
            cache = out[CACHE]
            logits.append(out.logits)
    return torch.cat(logits, 1), cache


def test_the_module_and_the_named_schedule_decay_alike(layout):
    layers = LAYOUTS[layout]
    for heads in (4, 16):  # the module's slopes are ALiBi's for powers of two, as published
        model = build(layout, num_attention_heads=heads)
        for i, layer in enumerate(model.model.layers):
            if layers[i] == "linear_attention":
                torch.testing.assert_close(-layer.self_attn.slope_rate.flatten(), decay.minimax(heads, i, len(layers)))


def test_whole_prompts_and_gradients(pair, ids, layout):
    original, ours = pair(layout)
    assert relative_error(ours(ids).logits, original(ids).logits) < EXACT
    compare_gradients(original, ours, ids)


@settings(max_examples=8)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 99),
    heads=st.sampled_from([2, 4, 6, 8]),
    head_dim=st.sampled_from([4, 8, 12]),
    block_size=st.sampled_from([1, 7, 16, 64]),
    length=st.integers(1, 70),
    batch=st.integers(1, 3),
)
def test_random_sizes(layout, seed, heads, head_dim, block_size, length, batch):
    sizes = {"num_attention_heads": heads, "head_dim": head_dim, "block_size": block_size}
    original = build(layout, seed, **sizes)
    ours = copy.deepcopy(original)
    apply_lightning_attention(ours)
    ids = torch.randint(3, 97, (batch, length))
    assert relative_error(ours(ids).logits, original(ids).logits) < EXACT
    if length > 1:
        compare_gradients(original, ours, ids)


def test_a_wrong_decay_would_be_seen(pair, ids, layout):
    original, ours = pair(layout)
    for module in ours.modules():
        if hasattr(module, "slope_rate"):
            module.slope_rate *= 1.001
    assert relative_error(ours(ids).logits, original(ids).logits) > 1.5 * EXACT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, padded, layout, side):
    original, ours = pair(layout)
    ids, mask = padded(side)
    with torch.no_grad():
        wanted, found = (m(ids, attention_mask=mask, use_cache=True) for m in (original, ours))
    assert relative_error(found.logits, wanted.logits) < EXACT  # at padded positions too
    for state, expected in zip(found[CACHE].linear_cache, wanted[CACHE].linear_cache, strict=True):
        if len(expected):
            assert relative_error(state, expected) < EXACT
    compare_gradients(original, ours, ids, mask)
    alone = ours(ids[1:2, mask[1].bool()]).logits
    assert relative_error(found.logits[1:2, mask[1].bool()], alone) < EXACT


@pytest.mark.parametrize("lengths", [[20, 30], [1] * 50, [17, 1, 1, 2, 28, 1]], ids=["two", "single", "mixed"])
def test_pieces_equal_the_whole(pair, ids, layout, lengths):
    original, ours = pair(layout)
    found, cache = chunks(ours, ids, lengths)
    assert relative_error(found, original(ids).logits) < EXACT
    if layout != "linear":
        assert cache.get_seq_length() == 50


def test_the_original_gets_pieces_wrong_where_a_linear_layer_comes_first(pair, ids):
    """Why the cache changes its class; when this fails, that has become needless."""
    original, _ = pair("7:1")
    found, cache = chunks(original, ids, [20, 30])
    assert cache.get_seq_length() == 0
    assert relative_error(found, original(ids).logits) > 0.1


def test_a_continued_piece_may_be_padded(pair, ids, layout):
    _, ours = pair(layout)
    mask = torch.ones_like(ids)
    mask[0, 20:27] = 0  # the second piece of the first row is shorter
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = ours(ids, attention_mask=mask, position_ids=positions).logits
        cache = ours(ids[:, :20], use_cache=True)[CACHE]
        found = ours(
            ids[:, 20:], attention_mask=mask, position_ids=positions[:, 20:], **{CACHE: cache}, use_cache=True
        ).logits
    assert relative_error(found, whole[:, 20:]) < EXACT


@pytest.mark.parametrize("first", ["original", "ours"])
@pytest.mark.parametrize("rest", [[30], [1] * 30, [5, 1, 24]], ids=["piece", "single", "mixed"])
@pytest.mark.parametrize("layout", ["1:1", "7:1"])
def test_either_continues_what_the_other_began(pair, ids, layout, first, rest):
    original, ours = pair(layout)
    begin, go_on = (original, ours) if first == "original" else (ours, original)
    with torch.no_grad():
        cache = begin(ids[:, :20], use_cache=True)[CACHE]
        if first == "original":  # one token says to our cache what it is; until then the original would be wrong
            logits = [go_on(ids[:, 20:21], **{CACHE: cache}, use_cache=True, position_ids=torch.tensor([[20]]))]
        else:
            logits = [go_on(ids[:, 20:21], **{CACHE: cache}, use_cache=True)]
        at = 21
        for n in rest:
            piece = ids[:, at : at + n]
            at += n
            if piece.shape[1]:
                logits.append(go_on(piece, **{CACHE: cache}, use_cache=True))
    found = torch.cat([out.logits for out in logits], 1)
    assert relative_error(found, original(ids).logits[:, 20:]) < EXACT


def test_rings_change_nothing_but_what_is_written(pair, ids, layout):
    """Steps, a piece, other rows, padding, and steps again; the state is whole whenever it is asked for."""
    _, ours = pair(layout)
    plain, ringed = LightningMiniMaxCache(), LightningMiniMaxCache(recent_tokens=4)
    layers = [i for i, kind in enumerate(LAYOUTS[layout]) if kind == "linear_attention"]
    rows = ids
    with torch.no_grad():
        for begin, end in pairwise([0, 20, *range(21, 31), 37, *range(38, 47)]):
            if end == 37:
                rows = rows[[2, 0, 0, 1, 1]]
                for cache in (plain, ringed):
                    cache.batch_select_indices(torch.tensor([2, 0, 0, 1, 1]))
            mask = torch.ones(len(rows), end, dtype=torch.long)
            mask[0, end - 1] = end != 42  # a token of padding
            before = [ringed.linear_cache[i].clone() for i in layers] if end > 20 else []
            found, wanted = (
                ours(rows[:, begin:end], attention_mask=mask, **{CACHE: cache}, use_cache=True).logits
                for cache in (ringed, plain)
            )
            assert relative_error(found, wanted) < EXACT
            if end == 22:  # it is one head's turn of four; of the others the ring alone has the token
                for i, state in zip(layers, before, strict=True):
                    assert (ringed.linear_cache[i] == state).flatten(2).all(-1).sum(1).tolist() == [3] * 3
    for i in layers:
        assert relative_error(ringed.linear_cache[i], plain.linear_cache[i]) > 0.01
        assert relative_error(ringed.get_linear_cache(i), plain.linear_cache[i]) < EXACT
        assert torch.equal(ringed.get_linear_cache(i), ringed.linear_cache[i])
    ringed.reset()
    assert not any(ringed.get_linear_cache(i).any() for i in layers)


def test_rings_are_copied_with_their_cache_and_read_by_the_original(pair, ids):
    original, ours = pair("1:1")
    cache = LightningMiniMaxCache(recent_tokens=8)
    with torch.no_grad():
        wanted = ours(ids).logits[:, 29:]
        for piece in (ids[:, :20], *ids[:, 20:29].split(1, 1)):
            ours(piece, **{CACHE: cache}, use_cache=True)
        for model in (ours, original):
            kept = copy.deepcopy(cache)
            found = [model(token, **{CACHE: kept}, use_cache=True).logits for token in ids[:, 29:].split(1, 1)]
            assert relative_error(torch.cat(found, 1), wanted) < EXACT


def test_what_a_hook_keeps_is_whole_and_stays(pair, ids):
    _, ours = pair("1:1")
    states = []
    for how in ({}, {"recent_tokens": 4}):
        cache, kept = LightningMiniMaxCache(**how), []
        with torch.no_grad():
            for piece in ids.split([20, 1, 1, 1, 1, 1, 25], 1):
                out = ours(piece, **{CACHE: cache}, use_cache=True, output_attentions=True)
                kept.append(out.attentions[1])
        states.append(torch.stack(kept))
    assert relative_error(states[1], states[0]) < EXACT
    assert relative_error(states[0][1], states[0][2]) > 0.01


def test_rings_of_inference_mode_are_read_outside_of_it(pair, ids):
    _, ours = pair("linear")
    cache = LightningMiniMaxCache(recent_tokens=4)
    with torch.inference_mode():
        for piece in ids[:, :22].split([20, 1, 1], 1):
            ours(piece, **{CACHE: cache}, use_cache=True)
    with torch.no_grad():
        found = ours(ids[:, 22:], **{CACHE: cache}, use_cache=True).logits
        assert relative_error(found, ours(ids).logits[:, 22:]) < EXACT


@pytest.mark.parametrize(
    ("length", "error"), [("16", TypeError), (1.5, TypeError), (True, TypeError), (-1, ValueError), (65, ValueError)]
)
def test_rings_of_no_length_are_refused(length, error):
    with pytest.raises(error, match=r"^recent_tokens is "):
        LightningMiniMaxCache(recent_tokens=length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_of_16_bits_is_one_the_original_can_go_on_with(pair, ids, dtype):
    original, ours = pair("1:1", state_dtype=dtype)
    original, ours = original.to(dtype), ours.to(dtype)
    with torch.no_grad():
        whole = ours(ids).logits
        for begin, go_on in ((original, ours), (ours, original)):
            cache = begin(ids[:, :49], use_cache=True)[CACHE]
            assert cache.linear_cache[1].dtype == dtype
            last = go_on(ids[:, 49:], **{CACHE: cache}, use_cache=True).logits
            assert relative_error(last, whole[:, 49:]) < 0.05


def test_bfloat16_is_at_least_as_close_to_the_truth_as_the_original(pair, ids, layout):
    """One layer against itself in float64, from the same rounded weights and slopes."""
    original, ours = pair(layout, block_size=64)
    i = LAYOUTS[layout].index("linear_attention")
    x = torch.randn(2, 300, 24, dtype=torch.bfloat16)
    theirs, mine = (m.bfloat16().model.layers[i].self_attn for m in (original, ours))
    exact = copy.deepcopy(mine).double()
    wanted = exact(x.double(), None, None)[0]
    error = relative_error(mine(x, None, None)[0], wanted)
    assert error < 1e-2
    assert error < relative_error(theirs(x, None, None)[0], wanted)
    with torch.no_grad():  # decoding, in pieces, on a state kept in float32
        cache = LightningMiniMaxCache()
        found = [mine(piece, None, None, cache)[0] for piece in x.split([200, 1, 50, *[1] * 49], 1)]
    assert cache.linear_cache[i].dtype == torch.float32
    assert relative_error(torch.cat(found, 1), wanted) < 1e-2


def test_float64_stays(pair):
    """One layer: the model rounds its routers and rotations to float32."""
    original, ours = (m.double().model.layers[0].self_attn for m in pair("7:1"))
    tables = original.decay_factors(original.slope_rate)  # from the same slopes, with all digits
    original.query_decay, original.key_decay, original.diagonal_decay = tables
    original.norm = ours.norm  # which does not round to float32, as the original's does
    x, cache = torch.randn(2, 50, 24, dtype=torch.float64), LightningMiniMaxCache()
    with torch.no_grad():
        found = [ours(piece, None, None, cache)[0] for piece in x.split([20, 1, 29], 1)]
    assert cache.linear_cache[0].dtype == torch.float64
    assert relative_error(torch.cat(found, 1), original(x, None, None)[0]) < 1e-12


def test_autocast(pair, ids, layout):
    original, ours = pair(layout)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(ids).logits, original(ids).logits
    assert found.dtype == wanted.dtype
    exact = original(ids).logits
    assert relative_error(found, exact) < 1.2 * relative_error(wanted, exact)


def test_gradients_through_a_continuation(pair, ids, layout):
    """Truncated or not, a state that autograd made carries its gradient, and is not written over."""
    _, ours = pair(layout)
    wanted = torch.autograd.grad(ours(ids, use_cache=False).logits.square().mean(), list(ours.parameters()))
    cache, logits = None, []
    for piece in ids.split([20, 1, 1, 28], 1):
        out = ours(piece, **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        logits.append(out.logits)
    found = torch.autograd.grad(torch.cat(logits, 1).square().mean(), list(ours.parameters()))
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < EXACT


def test_gradient_checkpointing(pair, ids, layout):
    original, ours = pair(layout)
    ours.train()
    # 5.23 calls it by its new name, and warns of the old one.
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    compare_gradients(original, ours, ids)


def test_a_token_is_read_in_place_unless_someone_keeps_the_states(pair, ids):
    _, ours = pair("1:1")
    with torch.no_grad():
        cache = ours(ids[:, :20], use_cache=True)[CACHE]
        address = cache.linear_cache[1].data_ptr()
        ours(ids[:, 20:21], **{CACHE: cache}, use_cache=True)
        assert cache.linear_cache[1].data_ptr() == address
        states = []
        for t in range(21, 24):
            out = ours(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True, output_attentions=True)
            states.append((out.attentions[1], out.attentions[1].clone()))
        ours(ids[:, 24:25], **{CACHE: cache}, use_cache=True)
    assert all(torch.equal(kept, copied) for kept, copied in states)
    assert not torch.equal(states[0][0], states[1][0])


def test_a_state_from_inference_mode_goes_on_outside(pair, ids):
    original, ours = pair("1:1")
    with torch.inference_mode():
        cache = ours(ids[:, :49], use_cache=True)[CACHE]
    with torch.no_grad():
        found = ours(ids[:, 49:], **{CACHE: cache}, use_cache=True).logits
    assert relative_error(found, original(ids).logits[:, 49:]) < EXACT
