"""Attention over whole sequences: training and prefill."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_attention.ops import backends, registration, transforms, validation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LightningOutput(NamedTuple):
    """What ``lightning_attention`` returns: output [B, T, H, E], final_state [N, H, D, E] or None."""

    output: Tensor
    final_state: Tensor | None


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in autocast's dtype where it is on, as for scaled_dot_product_attention; float64 stays.

    Before any check: under autocast q, k and v may come in several dtypes.
    """
    if not torch._C._is_any_autocast_enabled() or not isinstance(tensors[0], Tensor) or tensors[0].is_meta:
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if _is_cast(x) else x for x in tensors)


def _is_cast(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> LightningOutput:
    """Causal linear attention with a fixed decay per head, in time and memory linear in T.

    For each head, with λ = exp(log_decay) and S_0 the initial state::

        S_t = λ S_{t-1} + k_tᵀ v_t
        o_t = scale · q_t S_t

    computed in blocks as Lightning Attention-2 (arXiv 2401.04658) does, forward (Algorithm 1) and backward
    (Algorithm 2). Sums and states are kept in float32 (float64 for float64 inputs). Only the arguments are saved for
    the backward pass. There is no second derivative.

    Args:
        q: [B, T, H, D], bfloat16, float16, float32 or float64; any strides with a unit last one.
        k: [B, T, H, D], of q's dtype.
        v: [B, T, H, E], of q's dtype; E need not be D.
        log_decay: [H] float32 (or float64 for float64 inputs), natural logarithm of the decay per token, at
            most 0, which is checked on the CPU, where reading it costs nothing; −inf: no memory. None for no decay.
            May require grad. ``lightning_attention.decay`` has the schedules of published models.
        scale: factor on the output; the papers use 1.
        initial_state: [N, H, D, E] float32 (float64 for float64 inputs), the state before the first token of each
            sequence; None for zero. May require grad.
        output_final_state: whether to return the state after the last token of each sequence.
        cu_seqlens: [N+1] int32 or int64 on q's device, 0 = c_0 ≤ c_1 ≤ … ≤ c_N ≤ T: then B is 1, and sequence i is
            tokens c_i to c_{i+1} (possibly none). Tokens past c_N are padding: never read, their output is zero.
            None: every row of the batch is a sequence, and N = B.
        group: process group whose ranks, in order, hold consecutive slices of each sequence, this rank's being T
            tokens (T may differ, and be 0; with cu_seqlens, sequence i's slice is c_i to c_{i+1}, and N is the same on
            every rank). initial_state is the state before, and final_state the one after, the whole sequence, on every
            rank. The function differentiated is the sum of the ranks' losses: q, k and v get their gradients, and
            log_decay and initial_state get this rank's share, whose sum over the ranks is the gradient. Every rank
            must run the backward pass. docs/distributed.md says what travels.
        batch_invariant: make the bits of a sequence's results independent of what else is in the batch.
        backend: "triton", "tiled" or "reference"; None chooses by device.

    Returns:
        LightningOutput(output, final_state): [B, T, H, E] in q's dtype, and [N, H, D, E] float32 (float64 for float64
        inputs) or None. Both are differentiable.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype other than the above; group is not a process group.
        ValueError: a shape, stride, device or backend does not fit, or, on the CPU, cu_seqlens or log_decay is not as
            above.
        NotImplementedError: a transform of ``torch.func`` or forward-mode differentiation asks for what there is not:
            tangents of log_decay, a second derivative, batches of cu_seqlens, or anything of that with a group.
    """
    q, k, v = cast_for_autocast(q, k, v)
    validation.check_inputs(q, k, v, log_decay, "BT")
    validation.check_scale(scale)
    scale = scale * 1.0  # an integer would compile kernels for one, and a float then be taken for it
    num_sequences = q.shape[0]
    if cu_seqlens is not None:
        validation.check_cu_seqlens(cu_seqlens, q)
        if q.shape[0] != 1:
            raise ValueError(f"q has shape {list(q.shape)}; with cu_seqlens the batch B must be 1")
        num_sequences = cu_seqlens.shape[0] - 1
    validation.check_initial_state(initial_state, q, v, num_sequences)
    chosen = backends.choose(backend, q.device)
    if group is not None:
        transforms.refuse_group()
        from lightning_attention.distributed.sequence_parallel import SequenceParallel

        out, final = SequenceParallel.apply(
            q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant, chosen, group
        )
    else:
        out, final = registration.call(
            "attention",
            q,
            k,
            v,
            log_decay,
            initial_state,
            cu_seqlens,
            scale,
            output_final_state,
            batch_invariant,
            chosen,
        )
    return LightningOutput(out, final if output_final_state else None)
