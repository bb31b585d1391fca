"""Named sizes, of TransNormerLLM and of a Llama with as many weights; transformers is loaded when a size is used."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: The models that the commands know, by transformers' ``model_type``.
MODELS = ("transnormer", "llama")


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Args:
        layers: number of blocks.
        width: of the residual stream.
        heads: of a block's attention, width / heads wide each.
        glu_dim: inner width of TransNormerLLM's gated linear unit.
        llama_glu_dim: that of Llama's. It is larger: a block of Llama has no gate u, which is width² weights.
        tie_embeddings: whether embedding and output head are one matrix.
        scale_embedding: whether TransNormerLLM multiplies embeddings by sqrt(width).
    """

    layers: int
    width: int
    heads: int
    glu_dim: int
    llama_glu_dim: int
    tie_embeddings: bool = False
    scale_embedding: bool = True

    def glu(self, model: str) -> int:
        """The inner width of the gated linear unit of ``model``."""
        return self.llama_glu_dim if model == "llama" else self.glu_dim

    def fields(self, model: str) -> dict[str, Any]:
        """The fields of the configuration of ``model``, one of :data:`MODELS`."""
        if model == "llama":
            return {
                "num_hidden_layers": self.layers,
                "hidden_size": self.width,
                "num_attention_heads": self.heads,
                "intermediate_size": self.llama_glu_dim,
                "tie_word_embeddings": self.tie_embeddings,
            }
        return {
            "decoder_layers": self.layers,
            "decoder_embed_dim": self.width,
            "decoder_attention_heads": self.heads,
            "glu_dim": self.glu_dim,
            "tie_word_embeddings": self.tie_embeddings,
            "no_scale_embedding": not self.scale_embedding,
        }


# 385M, 1B and 7B as released; the papers name a 3B without its sizes, so these are the releases' proportions: heads of
# 128 and a glu_dim of 2.7 widths. 75M is ours, for experiments: it has 76 M weights with 16,384 tokens. Llama's units
# are glu_dim + width / 3 wide, to a multiple of 128, which a GPU's tiles want: within 1.5 % of the other's weights.
SIZES = {
    "75M": Size(12, 640, 5, 1792, 2048, tie_embeddings=True),
    "385M": Size(24, 1024, 8, 2816, 3200),
    "1B": Size(16, 2048, 16, 5632, 6272),
    "3B": Size(32, 2560, 20, 6912, 7808),
    "7B": Size(30, 4096, 32, 11008, 12416, scale_embedding=False),
}


VOCABULARY = 64_000  # tokens, in every release


def find_size(name: str) -> Size:
    """A size by its name, in either case. Raises ValueError when there is no such size."""
    if name.upper() not in SIZES:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(SIZES)}")
    return SIZES[name.upper()]


def default_glu_dim(width: int, model: str) -> int:
    """2.75 widths, as in the released 385M and 1B, or for Llama as many weights a block; to a multiple of 32."""
    return 32 * round((37 / 12 if model == "llama" else 2.75) * width / 32) or 32


def preset(name: str, model: str = "transnormer", **overrides: Any) -> PreTrainedConfig:
    """The configuration of a named size.

    Args:
        name: "75M", "385M", "1B", "3B" or "7B", in either case.
        model: "transnormer", or "llama" for a softmax model of as many weights, within 2 % of them.
        **overrides: fields of the configuration, such as ``vocab_size`` (64,000), instead of what the size says.

    Returns:
        A :class:`~lightning_attention.models.transnormer.TransnormerConfig`, or transformers' ``LlamaConfig`` with
        rotary positions, as many keys as queries and no biases.

    Raises:
        ValueError: there is no such size or model.
        TypeError: the configuration has no such field.
    """
    size = find_size(name)
    kind = classes(model)[0]
    known = {field.name for field in fields(kind)} | kind.attribute_map.keys()
    if unknown := sorted(overrides.keys() - known):
        raise TypeError(f"{kind.__name__} has no field {unknown[0]!r}")
    return kind(**{"vocab_size": VOCABULARY, **size.fields(model), **overrides})


def classes(model: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The classes of configuration and model. Raises ValueError when ``model`` is not one of :data:`MODELS`."""
    if model == "transnormer":
        from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM

        return TransnormerConfig, TransnormerForCausalLM
    if model == "llama":
        from transformers import LlamaConfig

        from lightning_attention.models.llama import LlamaForCausalLM

        return LlamaConfig, LlamaForCausalLM
    raise ValueError(f"model is {model!r}; it must be one of {', '.join(MODELS)}")
