"""Configuration of TransNormerLLM, with the field names of the released checkpoints."""

import os
from dataclasses import field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from lightning_attention.models.presets import find_size

# What a saved folder says to a process that has not imported this package: with trust_remote_code, the Auto classes of
# transformers run the file that `auto_map` names. The file says where the code is; it holds none.
_POINTER = "transnormer"
_POINTER_SOURCE = """\
# For transformers' trust_remote_code: the model's code is the installed package lightning-attention.
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM, TransnormerModel
"""
_AUTO_MAP = {
    "AutoConfig": f"{_POINTER}.TransnormerConfig",
    "AutoModel": f"{_POINTER}.TransnormerModel",
    "AutoModelForCausalLM": f"{_POINTER}.TransnormerForCausalLM",
}


class TransnormerConfig(PreTrainedConfig):
    """The configuration of a TransNormerLLM; the defaults are the released 385M.

    Args:
        vocab_size: number of tokens.
        decoder_embed_dim: width of the residual stream.
        decoder_layers: number of blocks.
        decoder_attention_heads: H, per block.
        hidden_dim: width of q, k, v and u, all heads together; None for ``decoder_embed_dim``.
        glu_dim: width inside the SGLU.
        no_scale_embedding: leave the embeddings as they are; otherwise they are scaled by sqrt(decoder_embed_dim).
        linear_use_lrpe_list: one 0 or 1 per block, 1 where queries and keys get LRPE; empty for the first block only,
            as every release has it.
        linear_act_fun: activation of q and k; "swish" and "silu" are one.
        norm_type: "simplermsnorm", the only one released.
        bias: whether projections have biases; no release has them.
        init_std: standard deviation of the initial weights.
        use_cache: whether generation returns and reads a :class:`TransnormerCache`.
        add_bos_token: what a tokenizer should do; the model does not read it.
        pad_token_id, bos_token_id, eos_token_id: special tokens; the embedding of ``pad_token_id`` stays zero.
        tie_word_embeddings: use the embedding matrix as the output head; no release does.
        skip_logits: whether a pass with labels leaves out the logits; None: in training.

    transformers' names ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``intermediate_size`` and
    ``initializer_range`` are accepted for the corresponding fields.

    Raises:
        ValueError: a size is not positive or does not divide, a list has the wrong length, or a choice is not one of
            those above.
    """

    model_type = "transnormer"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (transformers reads a plain list)
    attribute_map = {  # noqa: RUF012 (and a plain dict)
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
        "initializer_range": "init_std",
    }

    vocab_size: int = 64000
    decoder_embed_dim: int = 1024
    decoder_layers: int = 24
    decoder_attention_heads: int = 8
    hidden_dim: int | None = None
    glu_dim: int = 2816
    no_scale_embedding: bool = False
    linear_use_lrpe_list: list[int] = field(default_factory=list)
    linear_act_fun: str = "swish"
    norm_type: str = "simplermsnorm"
    bias: bool = False
    init_std: float = 0.02
    use_cache: bool = True
    add_bos_token: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    skip_logits: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        if self.hidden_dim is None:
            self.hidden_dim = self.decoder_embed_dim
        if not self.linear_use_lrpe_list:
            self.linear_use_lrpe_list = [1] + [0] * (self.decoder_layers - 1)
        self._check()
        kwargs["auto_map"] = dict(_AUTO_MAP)  # a release names its own files, which a folder saved here does not hold
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json`` and, beside it, the file by which ``trust_remote_code`` finds this package."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{_POINTER}.py").write_text(_POINTER_SOURCE, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing for this class, whose source is the installed package; a subclass elsewhere is copied."""
        if cls.__module__ != __name__:
            super().register_for_auto_class(auto_class)

    def _check(self) -> None:
        for name in ("vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "glu_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (self.hidden_dim or 0) % self.decoder_attention_heads:
            raise ValueError(
                f"hidden_dim is {self.hidden_dim}; it must be a multiple of decoder_attention_heads, "
                f"{self.decoder_attention_heads}"
            )
        if len(self.linear_use_lrpe_list) != self.decoder_layers:
            raise ValueError(
                f"linear_use_lrpe_list has {len(self.linear_use_lrpe_list)} entries; it must have one per block, "
                f"{self.decoder_layers}"
            )
        if self.linear_act_fun not in ("swish", "silu"):
            raise ValueError(f"linear_act_fun is {self.linear_act_fun!r}; it must be 'swish' or 'silu'")
        if self.norm_type != "simplermsnorm":
            raise ValueError(f"norm_type is {self.norm_type!r}; it must be 'simplermsnorm'")

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "TransnormerConfig":
        """The configuration of a named size: "75M", "385M", "1B", "3B" or "7B", with any field overridden.

        Raises:
            ValueError: ``name`` is none of these.
        """
        return cls(**{**find_size(name).fields(cls.model_type), **overrides})
