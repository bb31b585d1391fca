"""torch.compile takes the model whole: training, padded and packed batches, decoding."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from tests.support.numerics import relative_error

# Importing torch's own compiler says this under Python 3.11.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def make(layers: int) -> TransnormerForCausalLM:
    config = TransnormerConfig(
        vocab_size=97,
        decoder_embed_dim=16,
        decoder_layers=layers,
        decoder_attention_heads=2,
        glu_dim=16,
        init_std=0.2,
    )
    return TransnormerForCausalLM(config).eval()


@pytest.fixture
def model() -> TransnormerForCausalLM:
    return make(2)


@pytest.mark.slow
def test_through_inductor(ids: Tensor) -> None:
    model = make(1)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(ids, labels=ids, use_cache=False)
    expected = model(ids, labels=ids)
    assert relative_error(compiled.logits, expected.logits) <= 1e-6
    assert relative_error(compiled.loss, expected.loss) <= 1e-6


def test_a_training_step(model: TransnormerForCausalLM, ids: Tensor) -> None:
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_batches(model: TransnormerForCausalLM, ids: Tensor, kind: str) -> None:
    mask = torch.ones(3, 90)
    mask[0, :20], mask[1, 50:], mask[2, ::3] = 0, 0, 0
    if kind == "padded":
        inputs, real = {"input_ids": ids, "attention_mask": mask}, mask == 1
    else:
        inputs = {"input_ids": ids[:1], "labels": ids[:1], "cu_seqlens": torch.tensor([0, 30, 30, 90])}
        real = torch.ones(1, 90, dtype=torch.bool)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**inputs).logits[real], model(**inputs).logits[real]) <= 1e-6


# torch says this of its own look at a tensor between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_documents_marked_by_positions_break_the_graph_and_nothing_else(
    model: TransnormerForCausalLM, ids: Tensor
) -> None:
    positions = torch.cat([torch.arange(30), torch.arange(60)])[None]
    inputs = {"input_ids": ids[:1], "labels": ids[:1], "position_ids": positions}
    compiled = torch.compile(model, backend="aot_eager")(**inputs)
    expected = model(ids[:1], labels=ids[:1], cu_seqlens=torch.tensor([0, 30, 90]))
    assert relative_error(compiled.logits, expected.logits) <= 1e-6
    assert relative_error(compiled.loss, expected.loss) <= 1e-6
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="pass cu_seqlens to stay in one graph"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)


@torch.no_grad()
def test_decoding_is_not_compiled_anew_for_every_token(model: TransnormerForCausalLM, ids: Tensor) -> None:
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache = model(ids, use_cache=True)[CACHE]
    other = copy.deepcopy(cache)
    for t in range(6):
        step = ids[:, t : t + 1]
        logits = compiled(step, cache=cache).logits
        assert relative_error(logits, model(step, cache=other).logits) <= 1e-6
    assert counter.frame_count <= 2  # the second time the count of tokens is known to vary
    assert cache.positions.tolist() == [96] * 3
