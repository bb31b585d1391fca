"""How much arithmetic a token costs, and what share of a GPU's peak a run makes of it (docs/training.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_attention.training.progress import GpuUse

if TYPE_CHECKING:
    from lightning_attention.training.runtime import Runtime

BLOCK = 64  # tokens that linear attention multiplies with each other at once; the kernels' own blocks are as long

# Dense bf16, in TFLOP/s, as the makers state them. The first that a device's name holds, as a word, counts.
PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 836.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 836.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
    "MI300X": 1307.4,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder by which its weights, its arithmetic and its memory are counted.

    Args:
        linear: whether attention is linear; softmax otherwise.
        layers, width, glu_dim, vocab_size: as in its configuration.
        heads, head_dim: of the queries (and the values of linear attention).
        kv_heads: heads of keys and values; `heads` where attention is linear.
        query_dims: D of every layer: `head_dim`, or twice that with LRPE.
        tied: whether the output head is the embedding's matrix.
        others: weights that are no matrices, in all: LRPE's frequencies, norms, biases.
    """

    linear: bool
    layers: int
    width: int
    glu_dim: int
    vocab_size: int
    heads: int
    head_dim: int
    kv_heads: int
    query_dims: tuple[int, ...]
    tied: bool
    others: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read off a TransnormerConfig or transformers' LlamaConfig. Raises ValueError for another model's."""
        if config.model_type not in ("transnormer", "llama"):
            raise ValueError(f"config is of model type {config.model_type!r}; it must be 'transnormer' or 'llama'")
        linear = config.model_type == "transnormer"
        layers, width, glu_dim = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads
        if linear:
            head_dim, kv_heads, lrpe = config.hidden_dim // heads, heads, list(map(bool, config.linear_use_lrpe_list))
            others = sum(lrpe) * heads * head_dim
            others += layers * (4 * heads * head_dim + 2 * width + 2 * glu_dim) if config.bias else 0
        else:
            head_dim, kv_heads = config.head_dim or width // heads, config.num_key_value_heads
            lrpe = [False] * layers
            others = (2 * layers + 1) * width
            others += layers * ((heads + 2 * kv_heads) * head_dim + width) if config.attention_bias else 0
            others += layers * (2 * glu_dim + width) if config.mlp_bias else 0
        return cls(
            linear=linear, layers=layers, width=width, glu_dim=glu_dim, vocab_size=config.vocab_size, heads=heads,
            head_dim=head_dim, kv_heads=kv_heads, query_dims=tuple(head_dim * (1 + wide) for wide in lrpe),
            tied=config.tie_word_embeddings, others=others,
        )  # fmt: skip

    @property
    def block_matrices(self) -> int:
        """Weights in the matrices of one block."""
        hidden, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mixer = 5 * hidden if self.linear else 2 * hidden + 2 * kv  # q, k, v, u and out; q, k, v and out
        return self.width * (mixer + 3 * self.glu_dim)

    @property
    def table(self) -> int:
        """Weights in the embedding, and as many in the output head."""
        return self.vocab_size * self.width

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.layers * self.block_matrices + self.others + self.table * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """N: the weights that a token is multiplied with. The embedding is looked up; the head, tied or not, counts."""
        return self.layers * self.block_matrices + self.table

    def attention_flops(self, seq_len: int) -> int:
        """Forward, all layers, for a token of a sequence of so many: the mean over its positions."""
        if not self.linear:  # q·k and weights·v with half of the tokens
            return self.layers * 2 * seq_len * self.heads * self.head_dim
        # Within a block of C: q·k and scores·v with half of it. Between blocks: q·S, and k·v into S.
        E = self.head_dim
        return sum(self.heads * (BLOCK * (D + E) + 4 * D * E) for D in self.query_dims)


def flops_per_token(config: Any, seq_len: int) -> int:
    """6·N and three times attention's forward products: backward costs twice what forward does.

    What activation checkpointing computes again does not count, nor do norms, activations and the optimizer.

    Args:
        config: a TransnormerConfig or transformers' LlamaConfig; ValueError for another.
        seq_len: tokens in a sequence, on which the cost of softmax attention depends.
    """
    shape = Shape.of(config)
    return 6 * shape.multiplied + 3 * shape.attention_flops(seq_len)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, or None where that is not known.

    It is not known for a part of a GPU (MIG), nor for slower chips with a faster one's name (RTX 4090 D, Laptop).
    """
    if re.search(r"\b(MIG|Laptop)\b", device_name):
        return None
    return next((1e12 * peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b(?! D\b)", device_name)), None)


@dataclass(frozen=True)
class GpuMeter:
    """What to measure of a run's GPUs.

    Args:
        device: this process's.
        gpus: how many the run has in all.
        flops_per_token: of its model.
        peak: FLOP/s of a GPU; None where it is not known, or the run is not in bf16.
        remark: what to tell the user about that, once.
    """

    device: torch.device
    gpus: int
    flops_per_token: int
    peak: float | None
    remark: str | None

    @classmethod
    def of(cls, runtime: Runtime, model: Any, seq_len: int) -> GpuMeter | None:
        """The meter of a model with a `config` on this device; None on a CPU, where there is nothing to measure."""
        if runtime.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(runtime.device)
        peak = peak_flops(name)
        remark = f"no MFU is shown: the peak of {name} is not known" if runtime.bf16 and peak is None else None
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        gpus = torch.distributed.get_world_size() if together else 1
        flops = flops_per_token(model.config, seq_len)
        return cls(runtime.device, gpus, flops, peak if runtime.bf16 else None, remark)

    def read(self, tokens_per_second: float) -> GpuUse:
        """Read it now, at this speed of all GPUs together."""
        each = tokens_per_second / self.gpus
        return GpuUse(
            tokens_per_second=each,
            mfu=None if self.peak is None else each * self.flops_per_token / self.peak,
            peak_memory=torch.cuda.max_memory_allocated(self.device),
        )
