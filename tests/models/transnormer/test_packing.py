"""Packed documents are the documents."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerCache, TransnormerForCausalLM
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
            assert relative_error(out[CACHE].state(layer)[i], alone[CACHE].state(layer)[0]) <= 1e-5
        (alone.logits[0] * weight[start:stop]).sum().backward()
    assert out[CACHE].positions.tolist() == [30, 0, 1, 33, 21, 0]
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
    cache = model(packed, cu_seqlens=torch.tensor(cuts), use_cache=True)[CACHE]
    batch = torch.cat([model(following[:, t : t + 1], cache=cache).logits for t in range(3)], 1)
    cache = model(packed, cu_seqlens=torch.tensor(cuts), use_cache=True)[CACHE]
    again = model(following.view(1, 12), cache=cache, cu_seqlens=torch.arange(0, 13, 3)).logits
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


def restarting(cuts: list[int]) -> Tensor:
    return torch.cat([torch.arange(b - a) for _, a, b in documents(cuts)])[None]


def test_positions_that_start_again_begin_a_document(model: TransnormerForCausalLM, packed: Tensor) -> None:
    cuts = [0, 30, 31, 32, 64, 90]
    by_cuts = model(packed, labels=packed, cu_seqlens=torch.tensor(cuts), output_hidden_states=True)
    by_positions = model(packed, labels=packed, position_ids=restarting(cuts), output_hidden_states=True)
    assert torch.equal(by_positions.logits, by_cuts.logits)
    assert torch.equal(by_positions.loss, by_cuts.loss)
    assert torch.equal(by_positions.hidden_states[1], by_cuts.hidden_states[1])
    assert by_positions[CACHE].positions.tolist() == [30, 1, 1, 32, 26]
    shifted = model(packed, position_ids=restarting(cuts) + 7).logits  # counting may begin anywhere
    assert relative_error(shifted, by_cuts.logits) <= 1e-4


def test_rows_of_packed_documents(model: TransnormerForCausalLM, ids: Tensor) -> None:
    rows = [[0, 30, 90], [0, 90], [0, 1, 2, 88, 90]]
    positions = torch.cat([restarting(cuts) for cuts in rows])
    out = model(ids, labels=ids, position_ids=positions, output_hidden_states=True)
    out.loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, learned = torch.zeros(()), sum(90 - len(cuts) + 1 for cuts in rows)
    for row, cuts in enumerate(rows):
        for _, start, stop in documents(cuts):
            text = ids[row : row + 1, start:stop]
            alone = model(text, labels=text, output_hidden_states=True)
            assert relative_error(out.logits[row, start:stop], alone.logits[0]) <= 1e-5
            assert relative_error(out.hidden_states[2][row, start:stop], alone.hidden_states[2][0]) <= 1e-5
            if stop - start > 1:
                total = total + alone.loss * (stop - start - 1) / learned
    assert torch.allclose(out.loss, total, rtol=1e-6)
    total.backward()
    for name, p in model.named_parameters():
        assert relative_error(together[name], p.grad) <= 2e-5, name
    assert out[CACHE].positions.tolist() == [30, 60, 90, 1, 1, 86, 2]
    same = restarting([0, 40, 90])  # [1, T] positions for every row
    rows_together = model(ids, position_ids=same).logits
    assert torch.equal(rows_together, model(ids, position_ids=same.expand(3, 90)).logits)
    assert relative_error(rows_together[2:, 40:], model(ids[2:, 40:]).logits) <= 1e-5


def test_positions_mark_no_documents_with_a_mask_or_a_past(model: TransnormerForCausalLM, packed: Tensor) -> None:
    # The condition is transformers' own. LRPE sees the distances between the positions given.
    positions, mask = restarting([0, 30, 90]), torch.ones(1, 90)
    masked = model(packed, labels=packed, position_ids=positions, attention_mask=mask)
    assert masked[CACHE].positions.tolist() == [90]
    empty = TransnormerCache(model.config)
    given = model(packed, labels=packed, position_ids=positions, cache=empty)
    assert torch.equal(masked.logits, given.logits)
    assert torch.equal(masked.loss, given.loss)
    assert relative_error(model(packed, position_ids=positions).logits, masked.logits) > 0.01


@pytest.mark.parametrize("flash_names", [False, True])
def test_what_transformers_padding_free_collator_makes(model: TransnormerForCausalLM, flash_names: bool) -> None:
    texts = [torch.randint(3, 97, (n,)).tolist() for n in (17, 1, 40)]
    collate = DataCollatorWithFlattening(
        return_flash_attn_kwargs=flash_names, return_position_ids=not flash_names, return_tensors="pt"
    )
    batch = collate([{"input_ids": text} for text in texts])
    assert ("cu_seq_lens_q" in batch) == flash_names
    out = model(**batch)
    losses = []
    for text, logits in zip(texts, out.logits[0].split([17, 1, 40]), strict=True):
        alone = model(torch.tensor([text]))
        assert relative_error(logits, alone.logits[0]) <= 1e-5
        losses.append(cross_entropy(alone.logits[0, :-1], torch.tensor(text)[1:], reduction="none"))
    assert torch.allclose(out.loss, torch.cat(losses).mean(), rtol=1e-5)


def test_boundaries_have_one_name_at_a_time(model: TransnormerForCausalLM, packed: Tensor) -> None:
    cuts = torch.tensor([0, 90])
    with pytest.raises(ValueError, match="cu_seqlens and cu_seq_lens_q are both given"):
        model(packed, cu_seqlens=cuts, cu_seq_lens_q=cuts)
