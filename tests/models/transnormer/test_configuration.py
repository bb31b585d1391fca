from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM, TransnormerModel


# L (4 width² for q, k, v, u + width² out + 3 width · glu) + 2 · 64000 · width + width for theta.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("385M", 464_520_192), ("1B", 1_151_338_496), ("3B", 3_074_951_680), ("7B", 7_098_863_616)],
)
def test_named_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = TransnormerForCausalLM(TransnormerConfig.from_name(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_only_the_7b_does_not_scale_its_embeddings() -> None:
    unscaled = [n for n in ("385M", "1B", "3B", "7B") if TransnormerConfig.from_name(n).no_scale_embedding]
    assert unscaled == ["7B"]


def test_a_named_size_can_be_changed() -> None:
    config = TransnormerConfig.from_name("1B", vocab_size=1000, decoder_layers=2)
    assert (config.vocab_size, config.decoder_layers, config.linear_use_lrpe_list) == (1000, 2, [1, 0])
    assert config.decoder_embed_dim == 2048
    with pytest.raises(ValueError, match="name is '2B'; it must be one of 75M, 385M, 1B, 3B, 7B"):
        TransnormerConfig.from_name("2B")


def test_defaults_are_the_released_385m() -> None:
    config = TransnormerConfig()
    assert config.to_dict() == TransnormerConfig.from_name("385M").to_dict()
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.linear_use_lrpe_list == [1] + [0] * 23
    assert config.hidden_dim == config.decoder_embed_dim == 1024


def test_transformers_names_are_the_same_fields() -> None:
    config = TransnormerConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8)
    assert (config.decoder_embed_dim, config.decoder_layers, config.decoder_attention_heads) == (32, 2, 4)
    assert (config.glu_dim, config.hidden_dim, config.linear_use_lrpe_list) == (8, 32, [1, 0])
    assert (config.hidden_size, config.num_hidden_layers) == (32, 2)


def test_written_and_read_back(tmp_path: Path) -> None:
    config = TransnormerConfig(vocab_size=11, decoder_layers=3, linear_use_lrpe_list=[0, 1, 0], hidden_dim=2048)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, TransnormerConfig)
    ignored = {"transformers_version", "_name_or_path"}
    assert {k: v for k, v in read.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }


def test_auto_classes_know_the_model() -> None:
    config = TransnormerConfig(vocab_size=11, decoder_embed_dim=8, decoder_layers=1, glu_dim=8)
    assert type(AutoModel.from_config(config)) is TransnormerModel
    assert type(AutoModelForCausalLM.from_config(config)) is TransnormerForCausalLM


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dim": 1000, "decoder_attention_heads": 3}, "hidden_dim is 1000; it must be a multiple of .* 3"),
        ({"linear_use_lrpe_list": [1, 0]}, "linear_use_lrpe_list has 2 entries; .* 24"),
        ({"linear_act_fun": "gelu"}, "linear_act_fun is 'gelu'"),
        ({"norm_type": "layernorm"}, "norm_type is 'layernorm'"),
        ({"decoder_layers": 0}, "decoder_layers is 0; it must be at least 1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_refuses(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransnormerConfig(**fields)
