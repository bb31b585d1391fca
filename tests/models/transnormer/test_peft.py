"""LoRA adapters on every projection: trained, saved, loaded, merged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from tests.support.numerics import relative_error

peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.23 by names that it calls old.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def refusal() -> str:
    """Nothing, or why transformers does not: 5.24 wants a newer PEFT than there is."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        return str(error)
    return ""


PROJECTIONS = ["qkvu_proj", "out_proj", "l1", "l2", "l3"]


def adapt(model: TransnormerForCausalLM, **choices: object) -> torch.nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": PROJECTIONS, **choices})
    return peft.get_peft_model(model, config)


def fit(adapted: torch.nn.Module, ids: Tensor, steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    curve = []
    for _ in range(steps):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def test_adapters_learn_and_the_model_stays(model: TransnormerForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    model = TransnormerForCausalLM.from_pretrained(tmp_path / "base")  # an adapter writes down where its model lies
    before = {name: p.clone() for name, p in model.state_dict().items()}
    original = model(ids).logits
    adapted = adapt(model)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * len(PROJECTIONS) * 2
    assert all("lora_" in name for name in trained)
    curve = fit(adapted, ids)
    assert curve[-1] < curve[0] - 0.5
    with adapted.disable_adapter(), torch.no_grad():
        assert torch.equal(adapted.eval()(ids).logits, original)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(ids).logits
    said = adapted.generate(ids[:, :20], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)

    loaded = peft.PeftModel.from_pretrained(
        TransnormerForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(loaded.eval()(ids).logits, expected)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(auto.eval()(ids).logits, expected)

    merged = loaded.merge_and_unload()
    assert type(merged) is TransnormerForCausalLM
    assert merged.state_dict().keys() == before.keys()
    assert relative_error(merged(ids).logits, expected) <= 1e-5
    again = merged.generate(ids[:, :20], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(again, said)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(TransnormerForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)
    for name in ("embed_tokens.weight", "layers.0.token_mixer.lrpe.theta"):
        assert torch.equal(merged.model.state_dict()[name], before[f"model.{name}"])


@pytest.mark.skipif(bool(refusal()), reason=refusal())
def test_by_transformers_own_adapter_methods(model: TransnormerForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    model = TransnormerForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False))
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = TransnormerForCausalLM.from_pretrained(tmp_path / "base")
    assert relative_error(loaded(ids).logits, expected) > 0.01
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(loaded(ids).logits, expected)


def test_with_checkpointing_and_packed_documents(model: TransnormerForCausalLM, ids: Tensor) -> None:
    packed = {"input_ids": ids[:1], "labels": ids[:1], "cu_seqlens": torch.tensor([0, 40, 41, 90])}
    adapted = adapt(model, init_lora_weights=False).train()
    adapted(**packed).loss.backward()
    expected = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": True})
    adapted(**packed).loss.backward()
    for name, gradient in expected.items():
        assert relative_error(adapted.get_parameter(name).grad, gradient) <= 1e-6, name


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("choice", ["tokens", "lora"])
def test_adapters_of_the_embedding(ids: Tensor, choice: str, dora: bool, scaled: bool) -> None:
    """PEFT computes them around the embedding, and has to know how the model scales it."""
    sizes = {
        "vocab_size": 97,
        "decoder_embed_dim": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "glu_dim": 32,
    }
    model = TransnormerForCausalLM(TransnormerConfig(**sizes, no_scale_embedding=not scaled, init_std=0.2)).eval()
    original = model(ids).logits
    tokens = sorted(set(ids.flatten().tolist()))[:40]
    choices = {"trainable_token_indices": {"embed_tokens": tokens}, "target_modules": ["out_proj"]}
    if choice == "lora":
        choices = {"target_modules": ["embed_tokens", "out_proj"]}
    adapted = adapt(model, **choices, use_dora=dora).eval()
    assert relative_error(adapted(ids).logits, original) <= 1e-5
    curve = fit(adapted, ids)
    assert curve[-1] < curve[0] - 0.5
    trained = adapted.eval()(ids).logits
    assert relative_error(trained, original) > 0.1
    with torch.no_grad():
        embedded = adapted.get_input_embeddings()(ids)
    merged = adapted.merge_and_unload()
    assert relative_error(merged.get_input_embeddings()(ids), embedded) <= 1e-5
    assert relative_error(merged(ids).logits, trained) <= 1e-4
