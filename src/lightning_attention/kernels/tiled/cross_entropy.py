"""Cross entropy of some tokens' logits, whose memory the gradient takes."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, need_gradient: bool) -> Tensor:
    """Losses [n] of logits [n, V], in the type of the sums; the arguments are those of ``Backend.cross_entropy``."""
    sums = torch.promote_types(logits.dtype, torch.float32)
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0).unsqueeze(1)
    log_probabilities = logits.log_softmax(1, dtype=sums)
    losses = log_probabilities.gather(1, index).squeeze(1).neg_().masked_fill_(ignored, 0.0)
    if need_gradient:
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
        logits.copy_(gradient.masked_fill_(ignored.unsqueeze(1), 0.0))
    return losses
