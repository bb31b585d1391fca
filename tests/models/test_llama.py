"""transformers' Llama with no mask where none is needed, and served, against the same as transformers runs it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_attention.models.llama import ATTENTION, ServedLlama
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
