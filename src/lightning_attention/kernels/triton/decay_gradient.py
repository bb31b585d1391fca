"""The gradient of log_decay, from sums that the sweeps of a backward pass have at hand.

A token decays by one step what is carried past it. So the gradient is Σ_t F_t, where F_t, the flow past t, is ⟨state
before t, its gradient⟩: all that tokens before t contribute to outputs from t on. Between two tokens it gains what the
first one sends, k · dk, and loses what it gets, q · dq. The sum over a group of m rows that begins at g is then

    Σ F_t = m F_g + Σ_t (rows from t to the end of the group) (k_t · dk_t − q_t · dq_t)

The sweeps for dq and dk sum the second term, in float32 (``work.Flow``), and keep the state and its gradient at the
groups' borders, whose inner product is F_g. Over long sequences the second term alone would be a difference of large
sums: groups of 512 rows bound what rounding adds up to. Where a decay is strong nearly all of it would cancel within a
block: pairs of one block are therefore left out of it, and the sweep for dq sums (i − j) times what j sends to i.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.plan import Plan
from lightning_attention.kernels.triton.work import GROUP_ROWS, Segmentation, find_segment

BLOCK = 4096  # numbers of a state that a program multiplies


class Flows(NamedTuple):
    """What the sweeps leave: states and their gradients at the borders of groups, and sums [segments, H, programs]."""

    states: Tensor | None
    grads: Tensor | None
    sums: Tensor | None

    @classmethod
    def of(cls, plan: Plan, q: Tensor, v: Tensor, tiles_of_D: int) -> "Flows":
        """For a backward pass of q [B, T, H, D] and v [B, T, H, E]."""
        B, T, H, D = q.shape
        groups = B * (-(-T // GROUP_ROWS.value))
        # In 16 bits they cost a twentieth of what else a backward pass moves; float16 could not hold them.
        dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        states = torch.empty(2, groups, H, D, v.shape[3], dtype=dtype, device=q.device)
        sums = torch.zeros(plan.segment_count, H, 2 * tiles_of_D, dtype=torch.float32, device=q.device)
        return cls(*states.unbind(), sums)


NO_FLOWS = Flows(None, None, None)


def decay_gradient(
    plan: Plan, flows: Flows, T: int, initial: Tensor | None, dinitial: Tensor | None, states_before: Tensor | None,
    grads_after: Tensor | None,
) -> Tensor:  # fmt: skip
    """[H] float32, after a backward pass of the plan has written its part of the ``flows``."""
    states, grads, sums = flows
    assert states is not None
    assert sums is not None
    _, H, D, E = states.shape
    groups = -(-min(plan.segment_rows, T) // GROUP_ROWS.value)
    parts = -(-D * E // BLOCK)
    partial = torch.empty(plan.segment_count, groups, H, parts, dtype=torch.float32, device=states.device)
    args = (
        states, grads, initial, dinitial, states_before, grads_after, partial, *plan.segmentation, groups,
        T, H, D * E,
    )  # fmt: skip
    dispatch.run(flow_kernel, (parts, H, plan.segment_count * groups), args, (BLOCK,), 4, states.get_device())
    return partial.sum((0, 1, 3)) + sums.sum((0, 2))


@dispatch.unspecialized(triton.jit)
def flow_kernel(states, grads, initial, dinitial, states_before, grads_after, partial, segment_table,
                segments_per_sequence, segment_rows, begins, ends, groups, T, H, SIZE,
                BLOCK: tl.constexpr):  # fmt: skip
    """partial [segments, groups, H, parts]: m F_g of each group, a part of a state each.

    Where a segment begins, F is what the scan left of both states, or of the first in a sequence the initial state's.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    index = tl.program_id(2)
    col = part * BLOCK + tl.arange(0, BLOCK)
    inside = col < SIZE
    group = index % groups
    plan = Segmentation(segment_table, segments_per_sequence, segment_rows, begins, ends)
    segment = find_segment(plan, index // groups, T)
    at = segment.start + group * GROUP_ROWS
    rows = tl.minimum(segment.stop - at, GROUP_ROWS)
    wanted = (segment.sequence >= 0) & (rows > 0)
    if begins is not None:  # no document goes on across the border
        if wanted:
            wanted = tl.load(begins + at) < at
    product = tl.zeros([BLOCK], tl.float32)
    if wanted:
        if group > 0:
            place = segment.batch * tl.cdiv(T, GROUP_ROWS) + at // GROUP_ROWS
            where = (place.to(tl.int64) * H + head) * SIZE + col
            product = tl.load(states + where, mask=inside, other=0.0).to(tl.float32) * tl.load(
                grads + where, mask=inside, other=0.0).to(tl.float32)  # fmt: skip
        else:
            if segment.is_first:
                if dinitial is not None:
                    where = (segment.sequence.to(tl.int64) * H + head) * SIZE + col
                    product = tl.load(initial + where, mask=inside, other=0.0) * tl.load(
                        dinitial + where, mask=inside, other=0.0)  # fmt: skip
            else:
                if states_before is not None:
                    where = (segment.boundary_index.to(tl.int64) * H + head) * SIZE + col
                    product = tl.load(states_before + where, mask=inside, other=0.0) * tl.load(
                        grads_after + where - H * SIZE, mask=inside, other=0.0)  # fmt: skip
    number = (index * H + head) * tl.num_programs(0) + part
    tl.store(partial + number, tl.sum(product, 0) * tl.maximum(rows, 0))
