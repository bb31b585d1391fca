"""One step of the recurrence over a pool of states."""

import torch
from torch import Tensor

from lightning_attention.kernels.tiled import pool


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    rows = pool.read(state, slots)
    if log_decay is not None:
        rows = rows * log_decay.float().exp()[:, None, None]
    rows = torch.addcmul(rows, k.float()[..., None], v.float()[..., None, :])
    out = scale * (q.float()[..., None, :] @ rows).squeeze(-2)
    pool.write(state, slots, rows)
    return pool.mask_padding(out, slots).to(v.dtype)
