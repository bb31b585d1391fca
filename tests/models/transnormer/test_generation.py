"""transformers' generate(), with a state for a cache."""

import pytest
import torch
from torch import Tensor

from lightning_attention.models.transnormer import TransnormerCache, TransnormerForCausalLM

NEW = 12
FIXED = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def prompt(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Three prompts of 20, 13 and 1 tokens, padded on the left."""
    ids, mask = ids[:, :20], torch.ones(3, 20, dtype=torch.long)
    mask[1, :7], mask[2, :19] = 0, 0
    return ids, mask


def sums(model: TransnormerForCausalLM, text: Tensor, prompt: int) -> Tensor:
    """Log-likelihood of what follows the prompt, [B]."""
    scores = model(text, use_cache=False).logits.log_softmax(-1)[:, prompt - 1 : -1]
    return scores.gather(-1, text[:, prompt:, None]).sum((1, 2))


def test_greedy_is_the_argmax_of_the_whole_text(model: TransnormerForCausalLM, ids: Tensor) -> None:
    text = model.generate(ids[:, :20], do_sample=False, **FIXED)
    assert text.shape == (3, 20 + NEW)
    assert torch.equal(model(text, use_cache=False).logits[:, 19:-1].argmax(-1), text[:, 20:])


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"do_sample": True, "top_p": 0.9, "temperature": 1.3, "num_return_sequences": 2},
        {"num_beams": 4, "do_sample": False},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "sample", "beam", "beam-sample"],
)
def test_every_mode_says_the_same_with_and_without_the_cache(
    model: TransnormerForCausalLM, prompt: tuple[Tensor, Tensor], mode: dict
) -> None:
    said = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        said.append(model.generate(prompt[0], attention_mask=prompt[1], use_cache=use_cache, **mode, **FIXED))
    assert torch.equal(*said)


def test_beams_find_a_likelier_text_than_greedy(model: TransnormerForCausalLM, ids: Tensor) -> None:
    greedy, beam = (model.generate(ids[:, :20], num_beams=n, do_sample=False, **FIXED) for n in (1, 5))
    assert sums(model, beam, 20).sum() > sums(model, greedy, 20).sum() + 0.1


def test_left_padded_prompts_go_on_as_they_would_alone(
    model: TransnormerForCausalLM, prompt: tuple[Tensor, Tensor]
) -> None:
    ids, mask = prompt
    together = model.generate(ids, attention_mask=mask, do_sample=False, **FIXED)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row] == 1], do_sample=False, **FIXED)
        assert torch.equal(together[row, 20:], alone[0, -NEW:])


def test_a_prompt_may_be_read_in_pieces(model: TransnormerForCausalLM, prompt: tuple[Tensor, Tensor]) -> None:
    whole, pieces = (
        model.generate(prompt[0], attention_mask=prompt[1], do_sample=False, prefill_chunk_size=size, **FIXED)
        for size in (None, 6)
    )
    assert torch.equal(whole, pieces)


def test_embeddings_may_stand_for_the_prompt(model: TransnormerForCausalLM, ids: Tensor) -> None:
    text = model.generate(ids[:, :20], do_sample=False, **FIXED)
    embedded = model.get_input_embeddings()(ids[:, :20])
    assert torch.equal(model.generate(inputs_embeds=embedded, do_sample=False, **FIXED), text[:, 20:])


def test_goes_on_from_a_returned_cache(model: TransnormerForCausalLM, prompt: tuple[Tensor, Tensor]) -> None:
    ids, mask = prompt
    whole = model.generate(ids, attention_mask=mask, do_sample=False, **FIXED)
    first = model.generate(
        ids, attention_mask=mask, do_sample=False, return_dict_in_generate=True, **{**FIXED, "max_new_tokens": 5}
    )
    cache = first.past_key_values
    assert isinstance(cache, TransnormerCache)
    assert cache.get_seq_length() == 24  # the last token said has not been read
    rest = model.generate(
        first.sequences,
        attention_mask=torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1),
        past_key_values=cache,
        do_sample=False,
        **{**FIXED, "max_new_tokens": NEW - 5},
    )
    assert torch.equal(rest, whole)


def test_stops_at_the_end_token(model: TransnormerForCausalLM, ids: Tensor) -> None:
    free = model.generate(ids[:1, :20], do_sample=False, **FIXED)[0, 20:]
    stop = free[4].item()
    at = free.tolist().index(stop)
    text = model.generate(ids[:1, :20], do_sample=False, **{**FIXED, "eos_token_id": stop})
    assert text[0, 20:].tolist() == free[: at + 1].tolist()


def test_assisted_generation_is_refused(model: TransnormerForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(ids[:1, :20], assistant_model=model, **FIXED)
