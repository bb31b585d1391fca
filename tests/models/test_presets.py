"""Named sizes: what the papers have, and a softmax model as large."""

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from lightning_attention import models
from lightning_attention.models.presets import MODELS, SIZES, classes, default_glu_dim


def weights(name: str, model: str, vocab_size: int) -> int:
    with torch.device("meta"):
        built = classes(model)[1](models.preset(name, model, vocab_size=vocab_size))
    return sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_a_llama_has_as_many_weights(name: str) -> None:
    for vocab_size in (16_384, 64_000):
        ours, theirs = (weights(name, model, vocab_size) for model in MODELS)
        assert abs(theirs / ours - 1) < 0.02


def test_the_size_for_experiments() -> None:
    assert 50e6 < weights("75M", "transnormer", 16_384) < 100e6


def test_the_baseline_is_a_plain_llama() -> None:
    config = models.preset("3b", model="llama", vocab_size=1000)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 32, 2560)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (20, 20, 128)
    assert (config.attention_bias, config.mlp_bias, config.vocab_size) == (False, False, 1000)
    assert config.rope_parameters["rope_type"] == "default"
    assert config.tie_word_embeddings is False
    small = LlamaForCausalLM(models.preset("1B", "llama", vocab_size=100, hidden_size=32, num_hidden_layers=1))
    assert not [name for name, _ in small.named_parameters() if name.endswith("bias")]


def test_transnormer_presets_are_its_named_sizes() -> None:
    for name in SIZES:
        config = models.preset(name, vocab_size=700)
        assert config.to_dict() == type(config).from_name(name.lower(), vocab_size=700).to_dict()
        assert config.linear_use_lrpe_list == [1] + [0] * (config.decoder_layers - 1)
    assert [name for name in SIZES if models.preset(name).no_scale_embedding] == ["7B"]
    assert models.preset("1B", hidden_size=512).decoder_embed_dim == 512  # transformers' names are known too


def test_without_a_size_a_block_has_as_many_weights() -> None:
    for width in (640, 1024, 2048, 4096):
        ours = 5 * width**2 + 3 * width * default_glu_dim(width, "transnormer")
        theirs = 4 * width**2 + 3 * width * default_glu_dim(width, "llama")
        assert abs(theirs / ours - 1) < 0.02
    assert default_glu_dim(8, "llama") == 32


def test_what_there_is_not() -> None:
    with pytest.raises(ValueError, match="name is '2B'; it must be one of 75M, 385M, 1B, 3B, 7B"):
        models.preset("2B")
    with pytest.raises(ValueError, match="model is 'gpt2'; it must be one of transnormer, llama"):
        models.preset("1B", "gpt2")
    for model, kind in (("transnormer", "TransnormerConfig"), ("llama", "LlamaConfig")):
        with pytest.raises(TypeError, match=f"{kind} has no field 'vocabsize'"):
            models.preset("1B", model, vocabsize=5)


def test_a_preset_is_a_configuration_that_transformers_reads(tmp_path) -> None:
    for model in MODELS:
        models.preset("385M", model).save_pretrained(tmp_path / model)
        assert AutoConfig.from_pretrained(tmp_path / model).model_type == model
