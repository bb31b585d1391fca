"""One step of the recurrence over a pool of states."""

from torch import Tensor

from lightning_attention.kernels import pool
from lightning_attention.kernels.decays import carried, rate_of


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float,
    batch_invariant: bool, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    q, k = pool.repeated(q, v), pool.repeated(k, v)
    dtype = pool.accumulator(v)
    rows = pool.read(state, slots, dtype)
    new = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    rows = carried(rate_of(log_decay, k.shape[1], dtype, k.device), 1, rows, new)
    q = q.to(dtype)
    found = scale * (_summed(q[..., None] * rows) if batch_invariant else (q[..., None, :] @ rows).squeeze(-2))
    pool.write(state, slots, rows)
    return pool.deliver(found, v, slots, None, out)


def _summed(x: Tensor) -> Tensor:
    """[..., D, E] summed over D by halves: sums of two tensors, which have no order that depends on the others.

    A matrix product has: of odd E one in ten had other bits in another batch, with MKL.
    """
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        pairs = x[..., :half, :] + x[..., half : 2 * half, :]
        pairs[..., : x.shape[-2] % 2, :] += x[..., 2 * half :, :]
        x = pairs
    return x.squeeze(-2)
