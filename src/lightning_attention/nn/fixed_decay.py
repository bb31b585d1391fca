"""What the layers share: a decay per head that keeps its numbers whatever is done to the layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FixedDecay(nn.Module):
    """A layer with ``log_decay``, [H] float32, as a buffer that is no part of the state dict.

    It stays float32 whatever the layer is cast to: bfloat16 would move a decay of 0.999 by as much as 0.004.

    Args:
        num_heads: H.
        log_decay: [H] float32, natural logarithm of each head's decay.

    Raises:
        ValueError: ``log_decay`` is not [H] float32 with values (it is on the meta device).
    """

    log_decay: Tensor

    def __init__(self, num_heads: int, log_decay: Tensor) -> None:
        super().__init__()
        if log_decay.shape != (num_heads,) or log_decay.dtype != torch.float32 or log_decay.is_meta:
            raise ValueError(
                f"log_decay is {list(log_decay.shape)} {log_decay.dtype} on {log_decay.device}; it must be "
                f"[{num_heads}] torch.float32 with values"
            )
        # Kept as numbers too: loading a checkpoint by way of the meta device leaves no buffer to read them from.
        self._log_decay_values: list[float] = log_decay.tolist()
        self.register_buffer("log_decay", torch.tensor(self._log_decay_values, dtype=torch.float32), persistent=False)

    def reset_buffers(self) -> None:
        """Give ``log_decay`` its values again, on the device it is on; for buffers that were moved without them."""
        self.log_decay = torch.tensor(self._log_decay_values, dtype=torch.float32, device=self.log_decay.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedDecay":
        was_meta = self.log_decay.is_meta
        super()._apply(fn, recurse)
        # .to(bfloat16) and .half() cast every buffer, .to_empty() leaves any numbers in them.
        if self.log_decay.dtype != torch.float32 or was_meta:
            self.reset_buffers()
        return self
