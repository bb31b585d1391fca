"""The gradient of log_decay, from sums that the sweeps of a backward pass have at hand.

It is the sum over pairs s ≤ t of (t − s) times what s contributes to t's output and its gradient. A block's own pairs
the sweep for dq sums as they are. Of the others the sweeps have, by row, what it sends on past its block (k · dk, less
the block's own) and what it gets from before (q · dq): t − s is the rows from s to the end of its block, those from the
beginning of t's block to t, and the blocks between. What crosses a block whole, X, is what came to it less what stays:

    X_m = F_m − Σ q · dq,   F_m+1 = X_m + Σ k · dk        F: past the border before a block, ⟨state, its gradient⟩

So F is kept only for every group of 512 rows, where both sweeps write their states; the sums of the X between follow
from weights of the rows (``work.rows_crossed``). They are differences: over a longer group, or where a decay is so
strong that X is smaller than what rounding leaves of them, they would be noise. There X counts as 0: below 2^-7 that
was better for random inputs, but where only distant pairs have a gradient it lost that, so the limit is 2^-12.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import log2_decay
from lightning_attention.kernels.triton.plan import Plan
from lightning_attention.kernels.triton.tiling import Tiles
from lightning_attention.kernels.triton.work import GROUP_ROWS, Segmentation, find_segment, reaches_past

BLOCK = 4096  # numbers of a state that a program multiplies


class Flows(NamedTuple):
    """What the sweeps leave: states and their gradients at the borders of groups, and sums [segments, H, programs]."""

    states: Tensor | None
    grads: Tensor | None
    sums: Tensor | None

    @classmethod
    def of(cls, plan: Plan, tiles: Tiles, k: Tensor, v: Tensor) -> "Flows":
        """For a backward pass of k [B, T, Hk, D] and v [B, T, H, E]."""
        (B, T, H, _), D = v.shape, k.shape[3]
        programs = -(-D // tiles.TD)
        groups = B * (-(-T // GROUP_ROWS.value))
        # In 16 bits they cost a twentieth of what else a backward pass moves; float16 could not hold them.
        dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
        states = torch.empty(2, groups, H, programs * tiles.TD * tiles.BE, dtype=dtype, device=v.device)
        sums = torch.zeros(plan.segment_count, H, 2 * programs, dtype=torch.float32, device=v.device)
        return cls(*states.unbind(), sums)


NO_FLOWS = Flows(None, None, None)


def decay_gradient(
    plan: Plan, tiles: Tiles, flows: Flows, T: int, D: int, E: int, log_decay: Tensor | None, initial: Tensor | None,
    dinitial: Tensor | None, states_before: Tensor | None, grads_after: Tensor | None,
) -> Tensor:  # fmt: skip
    """[H] float32, after a backward pass of the plan has written its part of the ``flows``."""
    states, grads, sums = flows
    assert states is not None
    assert sums is not None
    H, size = states.shape[1:]
    groups = -(-min(plan.segment_rows, T) // GROUP_ROWS.value)
    parts = -(-size // BLOCK)
    partial = torch.empty(plan.segment_count, groups, H, parts, dtype=torch.float32, device=states.device)
    args = (
        states, grads, initial, dinitial, states_before, grads_after, log_decay, partial,
        *plan.segmentation, groups, T, H, size, D * E,
    )  # fmt: skip
    constants = (tiles.C, tiles.precision != "tf32", BLOCK)
    grid = (parts, H, plan.segment_count * groups)
    dispatch.run(flow_kernel, grid, args, constants, 4, states.get_device())
    return partial.sum((0, 1, 3)) + sums.sum((0, 2))


@triton.jit
def pairs(x, y, inside):
    return tl.load(x, mask=inside, other=0.0).to(tl.float32) * tl.load(y, mask=inside, other=0.0).to(tl.float32)


@dispatch.unspecialized(triton.jit)
def flow_kernel(states, grads, initial, dinitial, states_before, grads_after, log_decay, partial, segment_table,
                segments_per_sequence, segment_rows, begins, ends, groups, T, H, flow_size, size, C: tl.constexpr,
                EXACT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """partial [segments, groups, H, parts]: m F_g of each group, a part of a state each.

    Where a segment begins, F is what the scan left of both states, or of the first in a sequence the initial state's.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    index = tl.program_id(2)
    col = part * BLOCK + tl.arange(0, BLOCK)
    group = index % groups
    plan = Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends)
    segment = find_segment(plan, index // groups, T)
    at = segment.start + group * GROUP_ROWS
    rows = tl.minimum(segment.stop - at, GROUP_ROWS)
    rate = log2_decay(log_decay, head)
    is_far = reaches_past(rate, C, EXACT)
    if begins is None:  # past a segment of one short block, too
        is_far = is_far | ((segment.stop - segment.start < C) & reaches_past(rate, rows, EXACT))
    wanted = (segment.sequence >= 0) & (rows > 0) & is_far
    if begins is not None:  # what the document that goes on across the border crosses, if one does
        if wanted:
            wanted = tl.load(begins + at) < at
            rows = tl.minimum(rows, (tl.load(ends + at) - at) // C * C)
    product = tl.zeros([BLOCK], tl.float32)
    if wanted:
        inside = col < size
        if group > 0:
            place = segment.batch * tl.cdiv(T, GROUP_ROWS) + at // GROUP_ROWS
            where = (place.to(tl.int64) * H + head) * flow_size + col
            product = pairs(states + where, grads + where, col < flow_size)
        elif segment.is_first:
            if dinitial is not None:
                where = (segment.sequence.to(tl.int64) * H + head) * size + col
                product = pairs(initial + where, dinitial + where, inside)
        elif states_before is not None:
            where = (segment.boundary_index.to(tl.int64) * H + head) * size + col
            product = pairs(states_before + where, grads_after + where - H * size, inside)
    number = (index * H + head) * tl.num_programs(0) + part
    tl.store(partial + number, tl.sum(product, 0) * tl.maximum(rows, 0))
