"""The next token of every row from its logits."""

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, draws: Tensor) -> Tensor:
    """One token for each row, by inverting the cumulative distribution over the likeliest tokens.

    A row's token depends on that row alone. Nothing is read on the host.

    Args:
        logits: [N, V] float32.
        temperature: [N] float32, divides the logits; 0 takes the likeliest token.
        top_p: [N] float32, keep the fewest tokens that hold this much probability, one at least.
        draws: [N] float32, uniform in [0, 1).

    Returns:
        [N] int64 token ids.
    """
    greedy = temperature == 0
    heat = torch.where(greedy, 1, temperature)[:, None]
    # From the likeliest downwards: a small temperature then takes the others to −inf, not several to +inf, of which the
    # softmax is NaN.
    below = logits - logits.amax(-1, keepdim=True)
    probabilities, tokens = (below / heat).softmax(-1).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    kept = (cumulative - probabilities < top_p[:, None]) & (probabilities > 0)
    kept = kept.sum(-1, keepdim=True).clamp_min(1)
    total = cumulative.gather(-1, kept - 1)
    chosen = torch.searchsorted(cumulative, draws[:, None] * total, right=True)
    drawn = tokens.gather(-1, chosen.minimum(kept - 1)).squeeze(-1)
    # From the logits, not from the probabilities, where near ones become equal.
    return torch.where(greedy, logits.argmax(-1), drawn)
