"""Packed documents are the documents."""

import itertools

import pytest
import torch
from torch import Tensor

from lightning_attention.models.transnormer import TransnormerForCausalLM
from tests.support.numerics import relative_error

CUTS = [0, 30, 30, 31, 64, 85, 85]  # two empty documents, one of them the last; five tokens of padding follow


@pytest.fixture
def packed(ids: Tensor) -> Tensor:
    return ids[:1]


def documents(cuts: list[int]) -> list[tuple[int, int, int]]:
    return [(i, a, b) for i, (a, b) in enumerate(itertools.pairwise(cuts)) if b > a]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_logits_states_and_gradients(model: TransnormerForCausalLM, packed: Tensor, dtype: torch.dtype) -> None:
    weight = torch.randn(90, 97)
    weight[85:] = 0
    out = model(packed, cu_seqlens=torch.tensor(CUTS, dtype=dtype), use_cache=True)
    (out.logits[0] * weight).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i, start, stop in documents(CUTS):
        alone = model(packed[:, start:stop])
        assert relative_error(out.logits[:, start:stop], alone.logits) <= 1e-5
        for layer in range(3):
            assert relative_error(out.past_key_values.state(layer)[i], alone.past_key_values.state(layer)[0]) <= 1e-5
        (alone.logits[0] * weight[start:stop]).sum().backward()
    assert out.past_key_values.positions.tolist() == [30, 0, 1, 33, 21, 0]
    for name, p in model.named_parameters():
        assert relative_error(together[name], p.grad) <= 2e-5, name
    assert relative_error(model(packed).logits[:, 31:85], out.logits[:, 31:85]) > 0.05


def test_no_document_is_asked_for_the_next_ones_first_token(model: TransnormerForCausalLM, packed: Tensor) -> None:
    cuts = [0, 30, 64, 90]
    loss = model(packed, labels=packed, cu_seqlens=torch.tensor(cuts)).loss
    sums = [model(packed[:, a:b], labels=packed[:, a:b]).loss * (b - a - 1) for _, a, b in documents(cuts)]
    assert torch.allclose(loss, sum(sums) / (90 - 3), rtol=1e-6)
    padded = torch.tensor([0, 30, 64, 80])
    short = model(packed[:, :80], labels=packed[:, :80], cu_seqlens=padded).loss
    labels = packed.clone()
    labels[:, 81:] = -100  # the first token of the padding is nobody's, asked for or not
    assert torch.allclose(model(packed, labels=labels, cu_seqlens=padded).loss, short, rtol=1e-6)


@torch.no_grad()
def test_a_packed_prompt_continues_as_a_batch_and_as_packed(model: TransnormerForCausalLM, packed: Tensor) -> None:
    cuts, following = [0, 30, 31, 64, 90], torch.randint(3, 97, (4, 3))
    cache = model(packed, cu_seqlens=torch.tensor(cuts), use_cache=True).past_key_values
    batch = torch.cat([model(following[:, t : t + 1], past_key_values=cache).logits for t in range(3)], 1)
    cache = model(packed, cu_seqlens=torch.tensor(cuts), use_cache=True).past_key_values
    again = model(following.view(1, 12), past_key_values=cache, cu_seqlens=torch.arange(0, 13, 3)).logits
    for i, start, stop in documents(cuts):
        alone = model(torch.cat([packed[:, start:stop], following[i : i + 1]], 1)).logits[0, -3:]
        assert relative_error(batch[i], alone) <= 1e-5
        assert relative_error(again[0, 3 * i : 3 * i + 3], alone) <= 1e-5
    assert cache.positions.tolist() == [33, 4, 36, 29]


def test_refuses_rows_or_a_mask(model: TransnormerForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="cu_seqlens is given with 3 rows and no attention_mask"):
        model(ids, cu_seqlens=torch.tensor([0, 90]))
    with pytest.raises(ValueError, match="cu_seqlens is given with 1 rows and an attention_mask"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 90]), attention_mask=torch.ones(1, 90))
