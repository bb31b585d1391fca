"""The Triton kernels as a backend."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

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


def _of_floats(operation: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A launch with rings as the backend's operation, which is given low and scale after ``count``: it takes none."""
    low = [*signature(run).parameters].index("count") + 1

    @wraps(run)
    def launched(*args: Any) -> Any:
        if args[low] is not None:
            raise TypeError(f"state is QuantizedStates; backend 'triton' takes a tensor to {operation}")
        return run(*args[:low], *args[low + 2 :])

    return launched


BACKEND = Backend(
    name="triton", attention=attention, attention_backward=attention_backward, states=states, decode=decode,
    prefill=prefill, verify=verify, commit=commit, decode_recent=_of_floats("decode", recent.decode),
    prefill_recent=quantized.prefill, verify_recent=_of_floats("verify", recent.verify),
    commit_recent=_of_floats("commit", recent.commit), fold=_of_floats("fold", recent.fold),
    dequantize=quantized.dequantize, quantize=quantized.quantize, sequence_parallel=sequence_parallel,
    sequence_parallel_backward=sequence_parallel_backward, cross_entropy=cross_entropy, project=project,
    missing=missing,
)  # fmt: skip
