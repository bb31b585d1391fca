"""The Triton kernels as a backend."""

import torch

from lightning_attention.kernels.backend import Backend
from lightning_attention.kernels.triton import quantized, recent
from lightning_attention.kernels.triton.attention import attention, attention_backward
from lightning_attention.kernels.triton.cross_entropy import cross_entropy
from lightning_attention.kernels.triton.decode import decode
from lightning_attention.kernels.triton.prefill import prefill
from lightning_attention.kernels.triton.projection import project
from lightning_attention.kernels.triton.sequence_parallel import sequence_parallel, sequence_parallel_backward
from lightning_attention.kernels.triton.speculative import commit, verify
from lightning_attention.kernels.triton.states import states
from lightning_attention.kernels.triton.tiling import INTERPRETED


def missing(device: torch.device) -> str | None:
    """Why the device cannot run the kernels; Triton's interpreter runs them on a CPU."""
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETED):
        return None
    return "it needs a CUDA or ROCm device, or Triton's interpreter (TRITON_INTERPRET=1)"


BACKEND = Backend(
    name="triton", attention=attention, attention_backward=attention_backward, states=states, decode=decode,
    prefill=prefill, verify=verify, commit=commit, decode_recent=recent.decode,
    prefill_recent=quantized.prefill, verify_recent=recent.verify,
    commit_recent=recent.commit, fold=recent.fold,
    dequantize=quantized.dequantize, quantize=quantized.quantize, sequence_parallel=sequence_parallel,
    sequence_parallel_backward=sequence_parallel_backward, cross_entropy=cross_entropy, project=project,
    missing=missing,
)  # fmt: skip
