"""What happens to the model: only its own modules change, and all of it can be undone."""

import copy

import pytest
import torch

from lightning_attention.integrations.minimax import (
    FusedMiniMaxRMSNorm,
    LightningMiniMaxAttention,
    LightningMiniMaxCache,
    apply_lightning_attention,
    remove_lightning_attention,
)
from lightning_attention.models.arguments import CACHE
from tests.integrations.conftest import build
from tests.support import relative_error

minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")


def classes(model):
    return [type(m) for m in model.modules()]


def test_only_the_linear_layers_of_the_given_model_change():
    model, other = build("7:1"), build("7:1")
    before, forward = classes(model), minimax.MiniMaxLightningAttention.forward
    apply_lightning_attention(model)
    changed = {(a, b) for a, b in zip(before, classes(model), strict=True) if a is not b}
    assert changed == {
        (minimax.MiniMaxLightningAttention, LightningMiniMaxAttention),
        (minimax.MiniMaxRMSNorm, FusedMiniMaxRMSNorm),
    }
    assert sum(type(m) is FusedMiniMaxRMSNorm for m in model.modules()) == 7
    assert classes(other) == before
    assert minimax.MiniMaxLightningAttention.forward is forward


def test_undone_the_model_is_the_original_to_the_bit(ids):
    model = build("1:1")
    before = classes(model), model(ids).logits, {n: sorted(vars(m)) for n, m in model.named_modules()}
    apply_lightning_attention(model, state_dtype=torch.bfloat16)
    apply_lightning_attention(model)  # again, with another dtype
    assert model.model.layers[1].self_attn.state_dtype == torch.float32
    remove_lightning_attention(model)
    remove_lightning_attention(model)  # nothing left to do
    assert classes(model) == before[0]
    assert torch.equal(model(ids).logits, before[1])
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == before[2]


def test_checkpoints_stay_as_they_were(ids, tmp_path):
    model = build("7:1")
    tensors = {name: x.data_ptr() for name, x in model.state_dict().items()}
    apply_lightning_attention(model)
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == tensors
    model.save_pretrained(tmp_path)
    assert "ightning" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert classes(loaded) == classes(build("7:1"))
    assert relative_error(loaded(ids).logits, model(ids).logits) < 1e-5
    model.load_state_dict(loaded.state_dict())


def test_copies_and_pickles_keep_the_attention(ids, tmp_path):
    model = build("1:1")
    apply_lightning_attention(model)
    wanted = model(ids).logits
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert isinstance(copied.model.layers[1].self_attn, LightningMiniMaxAttention)
        assert torch.equal(copied(ids).logits, wanted)


def test_a_copy_of_the_cache_is_a_copy(ids):
    model = build("7:1")
    apply_lightning_attention(model)
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True)[CACHE]
        kept = copy.deepcopy(cache)
        first = model(ids[:, 20:21], **{CACHE: cache}, use_cache=True).logits
        model(ids[:, 21:], **{CACHE: cache}, use_cache=True)
        assert torch.equal(model(ids[:, 20:21], **{CACHE: kept}, use_cache=True).logits, first)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate_stay_and_run_our_attention(ids, hooked_first):
    """They hold a module's forward pass, as device_map over several devices leaves it."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    original, model, count = build("1:1"), build("1:1"), Count()
    if not hooked_first:
        apply_lightning_attention(model)
    hooks.add_hook_to_module(model, count)
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.self_attn, count)
    hooks.add_hook_to_module(model.model.layers[1].self_attn.norm, count)
    if hooked_first:
        apply_lightning_attention(model)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
    assert count.calls == 1 + 4 + 1
    assert type(cache) is LightningMiniMaxCache  # ours was here
    remove_lightning_attention(model)
    with torch.no_grad():
        found = model(ids, use_cache=True)
    assert type(found[CACHE]) is minimax.MiniMaxCache
    assert torch.equal(found.logits, original(ids).logits)
    hooks.remove_hook_from_module(model, recurse=True)
    apply_lightning_attention(model)
    assert type(model(ids, use_cache=True)[CACHE]) is LightningMiniMaxCache
    assert count.calls == 2 * (1 + 4 + 1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_low_rank_adapters_train(ids):
    peft = pytest.importorskip("peft")
    original = build("1:1")
    model = copy.deepcopy(original)
    apply_lightning_attention(model)
    config = peft.LoraConfig(target_modules=["qkv_proj", "output_gate", "out_proj"], r=2, init_lora_weights=False)
    grads = []
    for m in (original, model):
        torch.manual_seed(1)
        m = peft.get_peft_model(m, config)
        m(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad]))
    assert grads[0].norm() > 0
    assert relative_error(grads[1], grads[0]) < 1e-5


def test_a_compiled_model(ids):
    """Without a graph break, training, and decoding on a cache of ours, as the original's module does."""
    model = build("linear")
    apply_lightning_attention(model)
    model.set_experts_implementation("batched_mm")  # the eager ones depend on the data
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, wanted = compiled(ids, labels=ids, use_cache=False).loss, model(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, wanted)
    grads, expected = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, wanted))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    x = torch.randn(2, 24, 24)
    attention = model.model.layers[1].self_attn
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for recent_tokens in (0, 4):
        cache, other = (LightningMiniMaxCache(recent_tokens) for _ in range(2))
        with torch.no_grad():
            for piece in x.split([18, 1, 1, 2, 1, 1], 1):
                found, wanted = compiled(piece, None, None, cache)[0], attention(piece, None, None, other)[0]
                torch.testing.assert_close(found, wanted)


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="model is a Linear without a MiniMaxLightningAttention"):
        apply_lightning_attention(torch.nn.Linear(2, 2))
    model = build("1:1")
    with pytest.raises(TypeError, match=r"state_dtype is torch.int8; it must be torch.float32 or torch.bfloat16 or"):
        apply_lightning_attention(model, state_dtype=torch.int8)

    class Other(minimax.MiniMaxLightningAttention):
        pass

    model.model.layers[3].self_attn.__class__ = Other
    with pytest.raises(ValueError, match="contains a Other with a forward pass that is not transformers' own"):
        apply_lightning_attention(model)
    model = build("1:1")
    model.model.layers[3].self_attn.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="apply lightning attention before whatever wraps or replaces it"):
        apply_lightning_attention(model)
    assert type(model.model.layers[1].self_attn) is minimax.MiniMaxLightningAttention  # nothing done by half
