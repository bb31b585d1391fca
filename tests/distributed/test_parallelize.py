"""What is done to a model in one process; tests/training/test_distributed.py shards it over several."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_attention.distributed import parallelize as parallelize_module
from lightning_attention.distributed.mesh import Mesh
from lightning_attention.distributed.parallelize import find_blocks, parallelize
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM

BLOCKS = 9  # more than the compiler's limit of one function's graphs


def transnormer() -> nn.Module:
    sizes = {"decoder_embed_dim": 16, "decoder_attention_heads": 2, "glu_dim": 16, "decoder_layers": BLOCKS}
    return TransnormerForCausalLM(TransnormerConfig(vocab_size=50, **sizes))


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=BLOCKS, **sizes))


def gradients(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """And how many bytes the forward pass kept for the backward pass, weights aside."""
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, sum(kept.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks for one
@pytest.mark.parametrize("make", [transnormer, llama])
def test_gradients_names_and_memory(make, monkeypatch):
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compiled(forward, backend=compiler, fullgraph=True))
    memory = {}
    for how in ({}, {"activation_checkpointing": "3"}, {"activation_checkpointing": "block"}, {"compile": True}):
        torch.manual_seed(0)
        model = make().train()
        names = [name for name, _ in model.named_parameters()]
        assert len(find_blocks(model)) == BLOCKS
        parallelize(model, Mesh(), **how)
        found, memory[str(how)] = gradients(model)
        assert list(found) == names
        expected = expected if how else found  # noqa: F821 (the first round gives it)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    plain, third, every, _ = memory.values()
    assert every < 0.5 * plain
    assert every < third < plain
    assert 1 <= compiler.frame_count <= 2  # blocks with LRPE and those without, however many there are


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no nn.ModuleList of blocks to compile, checkpoint or shard"):
        parallelize(nn.Linear(2, 2), Mesh())


@pytest.mark.parametrize("choice", ["0", "-1", "blocks", "1.5", ""])
def test_other_words_for_checkpointing_are_refused(choice):
    with pytest.raises(ValueError, match=f"activation_checkpointing is {choice!r}; it must be none, block or a number"):
        parallelize(transnormer(), Mesh(), activation_checkpointing=choice)


def test_weights_of_two_types_in_a_block_are_named():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = transnormer()  # LRPE's frequencies stay in float32
    finally:
        torch.set_default_dtype(torch.float32)
    mesh = Mesh(1, 2, 1, shard_mesh=object())
    named = r"several dtypes in one block \(model\.layers\.0\..* torch\.float32"
    with pytest.raises(ValueError, match=named):
        parallelize(model, mesh)
    model.requires_grad_(False)  # frozen, as under adapters in float32
    parallelize_module._check_dtypes(model, find_blocks(model))
    model.lm_head.float().requires_grad_(True)
    model.model.embed_tokens.requires_grad_(True)
    with pytest.raises(ValueError, match=r"outside of blocks \(model\.embed_tokens\.weight torch\.bfloat16, lm_head"):
        parallelize(model, mesh)
