"""Cross entropy of some tokens' logits, and its gradient in their place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch

BLOCK = 4096  # logits that a program has in registers: 16 a thread


@dispatch.on_its_device
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, need_gradient: bool) -> Tensor:
    """Losses [n] float32 of contiguous logits [n, V]; the arguments are those of ``Backend.cross_entropy``.

    Raises:
        TypeError: the logits are neither float32 nor of 16 bits.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits are {logits.dtype}; the kernel takes float32, bfloat16 and float16")
    n, V = logits.shape
    losses = logits.new_empty(n, dtype=torch.float32)
    if n:
        args = (logits, targets.contiguous(), losses, ignore_index, V)
        block = min(BLOCK, max(128, triton.next_power_of_2(V)))
        dispatch.specialized(cross_entropy_kernel, (n, 1, 1), args, (need_gradient, block), 8, logits.get_device())
    return losses


# The width is specialized on: rows that are multiples of 16 bytes are read and written in as many bytes at a time.
@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(logits, targets, losses, ignore_index, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """A row for each program: its maximum and sum in one pass, the gradient in a second one, out of the cache."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    col = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
            for first in range(0, V, BLOCK):
                tl.store(logits + first + col, zeros, mask=first + col < V)
        return
    # No class of the vocabulary: nothing is read past the row, and the loss says so by being NaN.
    known = (target >= 0) & (target < V)
    # Before the reductions below, at which all warps wait for each other: after them the gradient takes its place.
    chosen = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    # Each lane has a maximum and a sum of its own. A finite one to begin with: ∞ − ∞ is NaN.
    highest = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(logits + first + col, mask=first + col < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    maximum = tl.max(highest, 0)
    log_total = maximum + tl.log(tl.sum(total * tl.exp(highest - maximum), 0))
    log_total = tl.where(known, log_total, float("nan"))
    tl.store(losses + row, log_total - chosen)
    if GRADIENT:
        for first in range(0, V, BLOCK):
            inside = first + col < V
            x = tl.load(logits + first + col, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - log_total) - tl.where(first + col == target, 1.0, 0.0)
            tl.store(logits + first + col, gradient.to(logits.dtype.element_ty), mask=inside)
