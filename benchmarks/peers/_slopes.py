"""Decays as other packages take them."""

import torch
from torch import Tensor


def slopes_of(log_decay: Tensor | None, H: int, device: torch.device) -> Tensor:
    """Positive slopes [H], and zero where nothing decays."""
    return torch.zeros(H, device=device) if log_decay is None else -log_decay
