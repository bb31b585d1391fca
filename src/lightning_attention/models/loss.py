"""The loss of a language model, from the hidden states before its head."""

import torch.nn.functional as F
from torch import Tensor

from lightning_attention.nn.linear_cross_entropy import linear_cross_entropy

# What transformers' loss takes beside labels: Trainer's number of labels in all accumulated batches, and labels already
# shifted.
OF_THE_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The same as transformers' loss of a causal language model, without logits.

    Args:
        hidden: [B, T, D], the last hidden states.
        weight: [V, D], the head's.
        labels: [B, T] token ids; the loss at t is that of the label at t + 1.
        shift_labels: [B, T] instead, the label at t for the loss at t.
        num_items_in_batch: what to divide the sum of the losses by; None for the number of labels that are learnt here.
        ignore_index: the label of what is not to be learnt.

    Returns:
        The mean negative log-likelihood in nats per token, a float32 scalar (float64 for float64).
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = linear_cross_entropy(
        hidden, weight, shift_labels.to(hidden.device), ignore_index=ignore_index, reduction=reduction
    )
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)
