"""transformers' generate(), with a state for a cache."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerCache, TransnormerForCausalLM
from tests.support.numerics import relative_error

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
    rings = {CACHE: TransnormerCache(model.config, recent_tokens=4)}
    for how in ({"use_cache": True}, {"use_cache": False}, rings):
        torch.manual_seed(7)
        said.append(model.generate(prompt[0], attention_mask=prompt[1], **how, **mode, **FIXED))
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])


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
    cache = first[CACHE]
    assert isinstance(cache, TransnormerCache)
    assert cache.get_seq_length() == 24  # the last token said has not been read
    rest = model.generate(
        first.sequences,
        attention_mask=torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1),
        cache=cache,
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


@pytest.mark.parametrize(
    "mode", [{"assistant_model": None}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}]
)
def test_assisted_generation_is_refused(model: TransnormerForCausalLM, ids: Tensor, mode: dict) -> None:
    mode = {name: model if value is None else value for name, value in mode.items()}
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(ids[:1, :20], do_sample=False, **mode, **FIXED)


def test_assisting_another_model_is_refused(model: TransnormerForCausalLM, ids: Tensor) -> None:
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(RuntimeError, match="a recurrent state cannot give tokens back"):
        other.generate(ids[:1, :20], assistant_model=model, do_sample=False, **FIXED)


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_another_kind_of_cache_is_refused(model: TransnormerForCausalLM, ids: Tensor, kind: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation is '{kind}'; leave it out"):
        model.generate(ids[:, :20], cache_implementation=kind, do_sample=False, **FIXED)


@pytest.mark.parametrize("beams", [1, 3])
def test_everything_that_may_be_asked_for(
    model: TransnormerForCausalLM, prompt: tuple[Tensor, Tensor], beams: int
) -> None:
    asked = {f"output_{name}": True for name in ("scores", "logits", "hidden_states")}
    out = model.generate(
        prompt[0],
        attention_mask=prompt[1],
        num_beams=beams,
        do_sample=False,
        return_dict_in_generate=True,
        **asked,
        **FIXED,
    )
    assert out.sequences.shape == (3, 20 + NEW)
    assert [len(out.scores), len(out.logits), len(out.hidden_states)] == [NEW] * 3
    # one for every block's input and one after the last norm; the whole prompt first, then single tokens
    assert [h.shape for h in out.hidden_states[0]] == [(3 * beams, 20, 32)] * 4
    assert [h.shape for h in out.hidden_states[-1]] == [(3 * beams, 1, 32)] * 4
    assert out[CACHE].batch_size == 3 * beams
    assert out[CACHE].get_seq_length() == 20 + NEW - 1
    if beams == 1:
        for row, real in enumerate(prompt[1].bool()):
            text = torch.cat([prompt[0][row, real], out.sequences[row, 20:]])
            expected = model(text[None]).logits[0, -NEW - 1 : -1]
            torch.testing.assert_close(torch.stack(out.logits)[:, row], expected, rtol=1e-4, atol=1e-4)


def test_prompts_may_be_embedded_and_padded_and_searched(
    model: TransnormerForCausalLM, prompt: tuple[Tensor, Tensor]
) -> None:
    ids, mask = prompt
    mode = {"attention_mask": mask, "num_beams": 3, "do_sample": False, **FIXED}
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **mode), model.generate(ids, **mode)[:, 20:])


def test_positions_may_be_given(model: TransnormerForCausalLM, prompt: tuple[Tensor, Tensor]) -> None:
    ids, mask = prompt
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    mode = {"attention_mask": mask, "do_sample": False, **FIXED}
    assert torch.equal(model.generate(ids, position_ids=positions, **mode), model.generate(ids, **mode))


def test_a_prefix_is_read_once_for_many_prompts(model: TransnormerForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        prefix = model(ids[:1, :50], use_cache=True)[CACHE]
    for row in range(3):
        whole = torch.cat([ids[:1, :50], ids[row : row + 1, 50:60]], 1)
        expected = model.generate(whole, do_sample=False, **FIXED)
        said = model.generate(whole, cache=copy.deepcopy(prefix), do_sample=False, **FIXED)
        assert torch.equal(said, expected)


def test_tokens_come_as_a_stream(model: TransnormerForCausalLM, ids: Tensor) -> None:
    class Streamer(BaseStreamer):
        tokens: list[int] = []  # noqa: RUF012

        def put(self, value: Tensor) -> None:
            self.tokens.extend(value.flatten().tolist())

        def end(self) -> None:
            self.tokens.append(-1)

    text = model.generate(ids[:1, :20], streamer=Streamer(), do_sample=False, **FIXED)
    assert Streamer.tokens == [*text[0].tolist(), -1]


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=["greedy", "beam"])
def test_in_float64(model: TransnormerForCausalLM, prompt: tuple[Tensor, Tensor], mode: dict) -> None:
    """With states in float64: whole, in pieces, and token by token."""
    model = model.double()
    ids, mask = prompt
    mode = {"attention_mask": mask, **mode, **FIXED}
    assert torch.equal(model.generate(ids, **mode), model.generate(ids, use_cache=False, **mode))
    with torch.no_grad():
        whole, cache = model(ids).logits, TransnormerCache(model.config)
        pieces = torch.cat([model(piece, cache=cache).logits for piece in ids.split([12, 7, 1], 1)], 1)
    assert {cache.state(layer).dtype for layer in range(3)} == {torch.float64}
    assert relative_error(pieces[:, :19], whole[:, :19]) <= 1e-13
    assert relative_error(pieces[:, 19:], whole[:, 19:]) <= 1e-6
