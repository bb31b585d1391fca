"""``parents`` of a tree of drafts, from the forms in which engines have it.

Nothing is read on the host: a call can be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from lightning_attention.ops import validation


def parents_of_mask(mask: Tensor) -> Tensor:
    """Each draft's parent, from which drafts it sees.

    Args:
        mask: [N, P, P], bool or numbers of which 0 is False: whether draft i of a sequence sees draft j. It sees its
            ancestors, all of them earlier drafts; itself and later ones are not looked at. Without columns for the
            tokens before the drafts.

    Returns:
        [N · P] int32, ``parents`` of ``lightning_attention_verify`` and ``_commit``: the last of the earlier drafts
        that it sees, or -1, the state, where there is none.

    Raises:
        TypeError: ``mask`` is not a tensor.
        ValueError: it is not [N, P, P] with P at least 1.
    """
    validation.check_tensor("mask", mask)
    if mask.ndim != 3 or mask.shape[1] != mask.shape[2] or mask.shape[2] == 0:
        raise ValueError(f"mask has shape {list(mask.shape)}; it must be [N, P, P] with P at least 1")
    draft = torch.arange(mask.shape[2], dtype=torch.int32, device=mask.device)
    return torch.where((mask != 0) & (draft[:, None] > draft), draft, -1).amax(-1).flatten()


def parents_of_links(first_child: Tensor, next_sibling: Tensor) -> Tensor:
    """Each draft's parent, from links to its first child and its next sibling.

    SGLang has them as ``retrieve_next_token`` and ``retrieve_next_sibling``, which older versions spell ``retrive_…``.

    Args:
        first_child: [N, P] int32 or int64, the place of a draft's first child among the drafts of its sequence, or
            negative where it has none.
        next_sibling: [N, P] of integers, the same of the next child of its parent.

    Returns:
        [N · P] int32, ``parents`` of ``lightning_attention_verify`` and ``_commit``: -1, the state, where no link leads
        to a draft, or to none before it among its siblings.

    Raises:
        TypeError: an argument is not a tensor of integers.
        ValueError: it is not [N, P] with P at least 1, or not on one device with the other.
    """
    validation.check_tensor("first_child", first_child)
    if first_child.ndim != 2 or first_child.shape[1] == 0:
        raise ValueError(f"first_child has shape {list(first_child.shape)}; it must be [N, P] with P at least 1")
    validation.check_dtype("first_child", first_child, validation.INDICES)
    validation.check_index("next_sibling", next_sibling, tuple(first_child.shape), "[N, P]", first_child)
    P = first_child.shape[1]
    draft = torch.arange(P, device=first_child.device).expand_as(first_child)
    parent, sibling = _from(first_child, draft), _from(next_sibling, draft)
    eldest = torch.where(sibling < 0, draft, sibling)
    for _ in range((P - 1).bit_length()):  # twice as far back at each turn, in whatever order siblings are
        eldest = eldest.gather(1, eldest)
    return parent.gather(1, eldest).flatten().to(torch.int32)


def _from(link: Tensor, draft: Tensor) -> Tensor:
    """[N, P]: the draft whose link leads to this one, or -1."""
    N, P = link.shape
    where = torch.where(link < 0, P, link).long()  # a place past the last for links that lead nowhere
    return torch.full((N, P + 1), -1, device=link.device).scatter(1, where, draft)[:, :P]
