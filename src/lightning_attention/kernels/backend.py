"""What a backend is: a name, a function for each operation, and which devices have it.

A new one is one such object, handed to ``lightning_attention.ops.backends.register``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Optional = Tensor | None

#: With ``batch_invariant`` prefill may read a prompt in chunks of a multiple of so many tokens, the last one of any
#: length: the bits are those of one call, and of ``lightning_attention``. On Triton a segment has as many rows. At H 8,
#: T 131072 on an H200 segments of 8192 were best forward, and of 2048 took 30 % more.
INVARIANT_CHUNK = 4096


class Ranks(Protocol):
    """The ranks that hold consecutive slices of each sequence: which of them this one is, and how many there are."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, message: Tensor, gathered: Tensor, *, meanwhile: bool = False) -> Callable[[], object]:
        """Start to write every rank's message, along the first dimension, to ``gathered``; wait with what is returned.

        ``meanwhile``: whether anything is to be computed before.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute the operations: functions of tensors that were checked, without autograd or autocast.

    The functions take their arguments by position, in the order given here. B, T, Hk, H, D, E and N are as in the
    public functions of the same names; what was not asked for or is not there is None, as an argument and as a result.
    ``log_decay`` is [H] or None, ``cu_seqlens`` [N+1] or None, ``slots`` [N] or None, ``state`` a pool [S, H, D, E].
    An initial or final state, and a gradient of one, is [N, H, D, E] in the type that sums are kept in: float32, and
    float64 for float64 inputs. Results are tensors of their own, contiguous, never views of arguments.

    A function raises TypeError or ValueError, naming the argument, what came and what is wanted, for a dtype or a size
    that the backend does not take.
    """

    name: str

    #: (q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant)
    #: -> output [B, T, H, E], final state
    attention: Callable[
        [Tensor, Tensor, Tensor, Optional, Optional, Optional, float, bool, bool], tuple[Tensor, Optional]
    ]

    #: (dout, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, batch_invariant, need_dlog_decay)
    #: -> gradients of q, k, v, log_decay and initial_state
    attention_backward: Callable[
        [Tensor, Optional, Tensor, Tensor, Tensor, Optional, Optional, Optional, float, bool, bool],
        tuple[Tensor, Tensor, Tensor, Optional, Optional],
    ]

    #: (k [B, T, Hk, D], v [B, T, H, E], log_decay, cu_seqlens, reverse, batch_invariant) -> [N, H, D, E]: for each
    #: sequence of n tokens Σ_t λ^(n−1−t) k_tᵀ v_t, t from 0, the state that it leaves from zero; ``reverse``:
    #: Σ_t λ^(t+1) k_tᵀ v_t, the gradient of the state that it starts from where k is q and v is the outputs' gradient
    states: Callable[[Tensor, Tensor, Optional, Optional, bool, bool], Tensor]

    #: (q [N, Hk, D], k, v, log_decay, state, slots, scale, batch_invariant, out)
    #: -> output [N, H, E], zero at padding, or None where ``out`` is given: there all but padding is written; the pool
    #: is written to
    decode: Callable[[Tensor, Tensor, Tensor, Optional, Tensor, Optional, float, bool, Optional], Optional]

    #: (q [T, Hk, D], k, v, log_decay, state, cu_seqlens, slots, fresh, scale, snapshot_at, snapshot_slots,
    #: batch_invariant, out) -> output [T, H, E] or None, as of decode; the pool is written to
    prefill: Callable[
        [Tensor, Tensor, Tensor, Optional, Tensor, Tensor, Optional, Optional, float, Optional, Optional, bool,
         Optional],
        Optional,
    ]  # fmt: skip

    #: (q [T, Hk, D], k, v, log_decay, state, cu_seqlens, slots, parents, scale, snapshots, snapshot_slots, out)
    #: -> output [T, H, E] or None, as of decode; the state after each draft is written to ``snapshots``, which may be
    #: the pool, where it is given
    verify: Callable[
        [Tensor, Tensor, Tensor, Optional, Tensor, Tensor, Optional, Optional, float, Optional, Optional, Optional],
        Optional,
    ]

    #: (k [T, Hk, D], v, log_decay, state, cu_seqlens, accepted, slots); the pool is written to
    commit: Callable[[Tensor, Tensor, Optional, Tensor, Tensor, Tensor, Optional], None]

    #: The four over a pool with rings: their arguments but ``out``, then k [S, H, R, D], v [S, H, R, E] and count [S]
    #: of ``RecentTokens``, then low and scale of ``QuantizedStates`` where ``state`` is its high, else None, then
    #: ``out``. kernels/recent.py says what rings hold, and which heads of a state a step folds them into;
    #: kernels/quantized.py, what the 8 bits mean. A prefill over a pool in 8 bits may be without rings.
    decode_recent: Callable[..., Optional]
    prefill_recent: Callable[..., Optional]
    verify_recent: Callable[..., Optional]
    commit_recent: Callable[..., None]

    #: (state, log_decay, slots, fresh [N] or None, k, v, count, low, scale): what the rings hold goes into the states,
    #: but where ``fresh``, and the rings are empty
    fold: Callable[[Tensor, Optional, Optional, Optional, Tensor, Tensor, Tensor, Optional, Optional], None]

    #: (high, low, scale, slots) -> [N, H, D, E] float32, zero at padding: rows of a pool in 8 bits
    dequantize: Callable[[Tensor, Tensor, Tensor, Optional], Tensor]

    #: (states [N, H, D, E] float32, high, low, scale, slots); the pool in 8 bits is written to
    quantize: Callable[[Tensor, Tensor, Tensor, Tensor, Optional], None]

    #: (q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, batch_invariant, ranks) -> output, the
    #: state after the last slice, the one before this rank's, and how many tokens each rank has of each sequence,
    #: [size, N] of the states' type; None: by ``states`` and ``attention``, one after the other
    sequence_parallel: Callable[..., tuple[Tensor, Optional, Tensor, Tensor]] | None = None

    #: (dout, dfinal, q, k, v, log_decay, start, cu_seqlens, lengths, scale, batch_invariant, need_dlog_decay, ranks)
    #: -> gradients of q, k, v, log_decay and start; dfinal is that in this rank's loss, start and lengths are the last
    #: two of the above; None: by ``states`` and ``attention_backward``
    sequence_parallel_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Optional, Tensor]] | None = None

    #: (logits [n, V], targets [n] int64, ignore_index, need_gradient) -> losses [n] in the type of the sums, zero where
    #: the target is ``ignore_index``; with ``need_gradient`` the gradient of their sum is then where the logits were;
    #: None: by another backend
    cross_entropy: Callable[[Tensor, Tensor, int, bool], Tensor] | None = None

    #: (x [N, K], weight [O, K], second [O, K], gate [N, K], residual [N, O], eps, silu) -> [N, O]: the products of a
    #: step of generation, as ``nn.projection.project`` has them; None: by PyTorch
    project: Callable[[Tensor, Tensor, Optional, Optional, Optional, float | None, int], Tensor] | None = None

    #: What a device lacks for this backend, as "it needs a GPU", or None where it lacks nothing.
    missing: Callable[[torch.device], str | None] = lambda device: None  # noqa: ARG005
