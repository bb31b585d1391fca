"""Padding, wherever it is, changes nothing for the tokens around it."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerForCausalLM
from tests.support.numerics import relative_error

LEFT = [[0] * 40 + [1] * 50, [1] * 90, [0] * 89 + [1]]
RIGHT = [[1] * 50 + [0] * 40, [1] * 90, [1] + [0] * 89]
HOLES = [[1, 0, 0] * 30, [0] * 10 + [1] * 70 + [0] * 10, [1, 1, 1, 0, 1, 0] * 15]


@pytest.mark.parametrize("rows", [LEFT, RIGHT, HOLES], ids=["left", "right", "holes"])
def test_logits_loss_and_gradients_are_those_of_each_row_alone(
    model: TransnormerForCausalLM, ids: Tensor, rows: list[list[int]]
) -> None:
    mask = torch.tensor(rows)
    weight = torch.randn(3, 90, 97) * mask[:, :, None]
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    (out.logits * weight).sum().backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in range(3):
        real = mask[row] == 1
        alone = model(ids[row : row + 1, real], output_hidden_states=True)
        assert relative_error(out.logits[row, real], alone.logits[0]) <= 1e-5
        for hidden, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
            assert relative_error(hidden[row, real], expected[0]) <= 1e-5
        for layer in range(3):
            assert relative_error(out[CACHE].state(layer)[row], alone[CACHE].state(layer)[0]) <= 1e-5
        (alone.logits[0] * weight[row, real]).sum().backward()
    assert out[CACHE].positions.tolist() == mask.sum(1).tolist()
    for name, p in model.named_parameters():
        assert relative_error(padded[name], p.grad) <= 2e-5, name


def test_what_the_padding_says_does_not_matter(model: TransnormerForCausalLM, ids: Tensor) -> None:
    mask = torch.tensor(HOLES)
    other = torch.where(mask == 1, ids, torch.randint(3, 97, ids.shape))
    assert not torch.equal(ids, other)
    real = mask == 1
    assert torch.equal(model(ids, attention_mask=mask).logits[real], model(other, attention_mask=mask).logits[real])
    # and without the mask it would
    assert relative_error(model(other).logits[real], model(ids).logits[real]) > 0.05


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=3, max_size=3),
    cuts=st.sampled_from([(5, 1, 6), (1, 11), (3, 1, 1, 1, 6), (12,)]),
    in_place=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_padding_in_any_piece_of_a_continuation(
    model: TransnormerForCausalLM, ids: Tensor, rows: list[list[bool]], cuts: tuple[int, ...], in_place: bool
) -> None:
    ids, mask = ids[:, :12], torch.tensor(rows)
    cache, logits, seen = None, [], 0
    with torch.set_grad_enabled(not in_place):
        for piece in ids.split(list(cuts), dim=1):
            seen += piece.shape[1]
            out = model(piece, attention_mask=mask[:, :seen], cache=cache, use_cache=True)
            cache = out[CACHE]
            logits.append(out.logits)
    together = torch.cat(logits, 1)
    assert cache.positions.tolist() == mask.sum(1).tolist()
    assert cache.get_seq_length() == 12
    for row in range(3):
        if not any(rows[row]):
            assert cache.state(0)[row].eq(0).all()
            continue
        alone = model(ids[row : row + 1, mask[row]])
        assert relative_error(together[row, mask[row]], alone.logits[0]) <= 1e-5
        assert relative_error(cache.state(2)[row], alone[CACHE].state(2)[0]) <= 1e-5


@torch.no_grad()
def test_a_step_needs_no_mask_after_a_padded_prompt(model: TransnormerForCausalLM, ids: Tensor) -> None:
    mask = torch.tensor(LEFT)
    cache = model(ids, attention_mask=mask, use_cache=True)[CACHE]
    with_positions = copy.deepcopy(cache)
    following = torch.randint(3, 97, (3, 1))
    logits = model(following, cache=cache).logits
    given = model(following, cache=with_positions, position_ids=mask.sum(1, keepdim=True)).logits
    assert torch.equal(logits, given)
    for row in range(3):
        alone = model(torch.cat([ids[row, mask[row] == 1], following[row]])[None]).logits[:, -1]
        assert relative_error(logits[row], alone) <= 1e-5


def test_given_positions_are_used(model: TransnormerForCausalLM, ids: Tensor) -> None:
    counted = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(90)[None]).logits, counted)
    # LRPE sees distances alone: a shift changes nothing, a stretch does.
    assert relative_error(model(ids, position_ids=torch.arange(90).expand(3, 90) + 50).logits, counted) <= 1e-4
    assert relative_error(model(ids, position_ids=2 * torch.arange(90)[None]).logits, counted) > 0.01


@pytest.mark.parametrize("shape", [(3, 89), (2, 90), (3, 1, 90, 90)])
def test_refuses_a_mask_of_another_shape(model: TransnormerForCausalLM, ids: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask is .*; it must be \[3, 90 or more\]"):
        model(ids, attention_mask=torch.ones(shape))


def test_refuses_positions_of_another_shape(model: TransnormerForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"position_ids is \[90\]; it must be \[3 or 1, 90\]"):
        model(ids, position_ids=torch.arange(90))


def test_returned_hidden_states_are_on_the_way_to_the_loss(model: TransnormerForCausalLM, ids: Tensor) -> None:
    mask = torch.tensor(LEFT)
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_hidden_states=True)
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.loss.backward()
    assert len(out.hidden_states) == 4
    for hidden in out.hidden_states:
        gradients = hidden.grad.abs().amax(2)
        assert gradients[1, :-1].gt(0).all()
        assert gradients[mask == 0].eq(0).all()


@pytest.mark.parametrize("rows", [LEFT[:2], RIGHT[:2]], ids=["left", "right"])
def test_the_loss_is_that_of_the_real_tokens(model: TransnormerForCausalLM, ids: Tensor, rows: list[list[int]]) -> None:
    ids, mask = ids[:2], torch.tensor(rows)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    alone = [model(row[real == 1][None], labels=row[real == 1][None]).loss for row, real in zip(ids, mask, strict=True)]
    assert torch.allclose(loss, (49 * alone[0] + 89 * alone[1]) / 138, rtol=1e-5)
