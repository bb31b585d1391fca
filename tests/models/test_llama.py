"""transformers' Llama with no mask where none is needed, and served, against the same as transformers runs it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_attention.models.llama import ATTENTION, ServedLlama
from lightning_attention.models.presets import classes
from lightning_attention.models.pretrained import save_model
from lightning_attention.serving import ContinuousBatch, Request


@pytest.fixture
def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """One model twice: with our attention and with transformers' eager one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ours, theirs = (
        LlamaForCausalLM._from_config(
            LlamaConfig(vocab_size=97, pad_token_id=0, **sizes), attn_implementation=attention
        ).eval()
        for attention in (ATTENTION, "eager")
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def test_agrees_whole_and_padded(pair, ids) -> None:
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for arguments in ({}, {"attention_mask": mask}):
        ours, theirs = (model(ids, **arguments).logits for model in pair)
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-5)
    written = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in pair]
    assert torch.equal(*written)


def test_compiled_it_makes_no_mask(pair, ids) -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        calls.extend(n.kwargs for n in graph.graph.nodes if "scaled_dot_product" in str(n.target))
        return graph

    ours, theirs = pair
    loss = torch.compile(ours, backend=backend)(input_ids=ids, labels=ids, use_cache=False).loss
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [(None, True)] * 2
    torch.testing.assert_close(loss, theirs(ids, labels=ids).loss, rtol=1e-5, atol=0)


def test_a_saved_folder_does_not_name_it(pair, tmp_path: Path) -> None:
    pair[0].save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_served_it_writes_what_generate_writes(kv_heads: int) -> None:
    """Greedy, prompts of several lengths that join a running batch and are read in pieces."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=97, num_key_value_heads=kv_heads, pad_token_id=0, initializer_range=0.3, **sizes)
    model = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION).double().eval()
    prompts = [torch.randint(3, 97, (n,)) for n in (1, 30, 7, 12, 3)]
    batch = ContinuousBatch(ServedLlama(model, 40), max_batch=2, prefill_tokens=8)
    written: dict[int, list[int]] = {
        batch.submit(Request(ids.tolist(), max_tokens=10, temperature=0)): [] for ids in prompts
    }
    while batch.busy:
        for number, token, _ in batch.step():
            written[number].append(token)
    for ids, ours in zip(prompts, written.values(), strict=True):
        theirs = model.generate(ids[None], max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=None)
        assert ours == theirs[0, len(ids) :].tolist()
    assert len({tuple(tokens) for tokens in written.values()}) == len(prompts)


def test_served_it_has_room_for_so_many_tokens(pair) -> None:
    batch = ContinuousBatch(ServedLlama(pair[0], 12), max_batch=3)
    assert batch.states[0].shape == (2, 4, 2, 12, 16)
    with pytest.raises(ValueError, match="prompt and max_tokens are 13 tokens; the model's context_length is 12"):
        batch.submit(Request([5] * 3, max_tokens=10))


@pytest.mark.parametrize("tied", [False, True])
def test_trains_without_logits(ids, tied: bool) -> None:
    """Loss and gradients are transformers' own, with documents, a number of items and labels that are left out."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=97, pad_token_id=0, tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    ours = classes("llama")[1]._from_config(config, attn_implementation="sdpa").train()
    theirs = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").train()
    theirs.load_state_dict(ours.state_dict())
    positions = torch.cat([torch.arange(15), torch.arange(25)]).expand_as(ids)
    shifted = ids.roll(-1, 1)
    shifted[:, [14, -1]] = -100
    for given in ({"labels": ids}, {"labels": ids, "position_ids": positions, "shift_labels": shifted},
                  {"labels": ids, "num_items_in_batch": torch.tensor(31)}):  # fmt: skip
        results = [model(input_ids=ids, use_cache=False, **given) for model in (ours, theirs)]
        assert results[0].logits is None
        assert results[1].logits is not None
        torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-5, atol=0)
        gradients = [torch.autograd.grad(out.loss, list(model.parameters()))
                     for out, model in zip(results, (ours, theirs), strict=True)]  # fmt: skip
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert ours(input_ids=ids, labels=ids, skip_logits=False).logits.shape == (2, 40, 97)
    assert ours.eval()(input_ids=ids, labels=ids).logits.shape == (2, 40, 97)
    assert ours(input_ids=ids, labels=ids, skip_logits=True).logits is None


def test_a_saved_one_is_transformers_own(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = classes("llama")[1]._from_config(config, attn_implementation=ATTENTION)
    save_model(model, tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
