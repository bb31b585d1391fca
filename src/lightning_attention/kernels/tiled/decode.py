"""One step of the recurrence over a pool of states."""

from torch import Tensor

from lightning_attention.kernels import pool
from lightning_attention.kernels.tiled.decays import carried, rate_of


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    q, k = pool.repeated(q, v), pool.repeated(k, v)
    dtype = pool.accumulator(v)
    rows = pool.read(state, slots, dtype)
    new = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    rows = carried(rate_of(log_decay, k.shape[1], dtype, k.device), 1, rows, new)
    out = scale * (q.to(dtype)[..., None, :] @ rows).squeeze(-2)
    pool.write(state, slots, rows)
    return pool.mask_padding(out, slots).to(v.dtype)
