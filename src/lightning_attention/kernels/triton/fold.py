"""From what the slices on all ranks leave to what this rank's starts from, and backward to the gradient at its end."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.numerics import log2_decay, whole_and_rest
from lightning_attention.kernels.triton.plan import Plan
from lightning_attention.kernels.triton.scan import joined

BLOCK = 1024  # numbers of a state that a program folds


def write_lengths(cu_seqlens: Tensor | None, T: int, lengths: Tensor) -> None:
    """Write how many tokens each sequence has, [N] float32: T, or what cu_seqlens says."""
    N = lengths.shape[0]
    dispatch.run(lengths_kernel, (-(-N // 256), 1, 1), (cu_seqlens, lengths, T, N), (256,), 4, lengths.get_device())


def fold_starts(
    gathered: Tensor, initial: Tensor | None, start: Tensor, final: Tensor | None, lengths: Tensor, plan: Plan | None,
    boundary_states: Tensor | None, log_decay: Tensor | None, rank: int,
) -> None:  # fmt: skip
    """Write ``start``, the state before this rank's slice, and ``final``, the one after the last, [N, H, D, E] each.

    ``gathered``, of each rank: what its slices leave, N·H·D·E numbers, and the tokens of each sequence, N, which go to
    ``lengths`` [ranks, N]. ``boundary_states``, between the segments of a plan that splits and from zero, are made to
    be from the start.
    """
    args = (
        gathered, initial, start, final, lengths, boundary_states, log_decay, *_boundaries(plan), rank,
        lengths.shape[0], start.numel() + lengths.shape[1], start.numel(),
    )  # fmt: skip
    _run(start_kernel, start, args)


def fold_ends(
    gathered: Tensor, lengths: Tensor, dend: Tensor, plan: Plan | None, grads_after: Tensor | None,
    log_decay: Tensor | None, cu_seqlens: Tensor | None, T: int, rank: int,
) -> None:  # fmt: skip
    """Write ``dend``, the gradient of the state after this rank's slice, [N, H, D, E].

    ``gathered`` [ranks or twice as many, N, H, D, E]: of each rank the gradient of what its slice starts from, through
    its own outputs, and that of the final state where there are any. ``lengths`` as above. ``grads_after``, those after
    the segments of a plan that splits and from zero, are made to be from the end.
    """
    args = (
        gathered, lengths, dend, grads_after, log_decay, cu_seqlens, *_boundaries(plan), T, rank, lengths.shape[0],
        gathered.shape[0] // lengths.shape[0], dend.numel(),
    )  # fmt: skip
    _run(end_kernel, dend, args)


def copy_state(source: Tensor, target: Tensor) -> None:
    """Copy a contiguous tensor; PyTorch's own copy could not be recorded."""
    grid = (-(-source.numel() // BLOCK), 1, 1)
    dispatch.run(copy_kernel, grid, (source, target, source.numel()), (BLOCK,), 4, source.get_device())


def _boundaries(plan: Plan | None) -> tuple[Tensor | None, int, int]:
    """Where the states between the segments of a sequence lie."""
    return (None, 0, 0) if plan is None else (plan.first_boundary, plan.segments_per_sequence, plan.segment_rows)


def _run(kernel: Any, state: Tensor, args: tuple[Any, ...]) -> None:
    N, H, D, E = state.shape
    dispatch.run(kernel, (N, H, -(-D * E // BLOCK)), (*args, D * E), (BLOCK,), 4, state.get_device())


@dispatch.unspecialized(triton.jit)
def lengths_kernel(cu_seqlens, lengths, T, N, BLOCK: tl.constexpr):
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = sequence < N
    length = tl.zeros([BLOCK], tl.int32) + T
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence, mask=real, other=0)
        length = (tl.load(cu_seqlens + sequence + 1, mask=real, other=0) - begin).to(tl.int32)
    tl.store(lengths + sequence, length.to(tl.float32), mask=real)


@dispatch.unspecialized(triton.jit)
def copy_kernel(source, target, count: "i64", BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + number, tl.load(source + number, mask=number < count), mask=number < count)


@triton.jit
def passed(state, local, rate, rows):
    """λ^rows state + local."""
    whole, rest = whole_and_rest(rate * rows * 0.6931471805599453)
    return joined(state, local, whole, rest)


@triton.jit
def program_of(SIZE, BLOCK: tl.constexpr):
    """A program's sequence and head, how many heads there are, its columns of a flat state, and where they lie."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    H = tl.num_programs(1)
    col = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    return sequence, head, H, col, col < SIZE, (sequence.to(tl.int64) * H + head) * SIZE + col


@triton.jit
def boundaries_of(first_boundary, segments_per_sequence, sequence):
    """The first of the states between a sequence's segments, and how many there are."""
    begin = sequence * segments_per_sequence
    count = segments_per_sequence
    if first_boundary is not None:
        begin = tl.load(first_boundary + sequence)
        count = tl.load(first_boundary + sequence + 1) - begin
    return begin, count


@dispatch.unspecialized(triton.jit)
def start_kernel(gathered, initial, start, final, lengths, boundary_states, log_decay, first_boundary,
                 segments_per_sequence, segment_rows, rank, ranks, message_size: "i64", states_size: "i64", SIZE,
                 BLOCK: tl.constexpr):  # fmt: skip
    sequence, head, H, col, inside, of_sequence = program_of(SIZE, BLOCK)
    rate = log2_decay(log_decay, head)
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + of_sequence, mask=inside, other=0.0)
    for r in range(0, rank):
        message = gathered + r * message_size
        local = tl.load(message + of_sequence, mask=inside, other=0.0)
        state = passed(state, local, rate, tl.load(message + states_size + sequence))
    tl.store(start + of_sequence, state, mask=inside)
    if boundary_states is not None:
        begin, count = boundaries_of(first_boundary, segments_per_sequence, sequence)
        for i in range(0, count):
            where = boundary_states + ((begin + i).to(tl.int64) * H + head) * SIZE + col
            local = tl.load(where, mask=inside, other=0.0)
            tl.store(where, passed(state, local, rate, i * segment_rows), mask=inside)
    if final is not None:
        for r in range(rank, ranks):
            message = gathered + r * message_size
            local = tl.load(message + of_sequence, mask=inside, other=0.0)
            state = passed(state, local, rate, tl.load(message + states_size + sequence))
        tl.store(final + of_sequence, state, mask=inside)
    if (head == 0) & (tl.program_id(2) == 0):
        for r in range(0, ranks):
            length = tl.load(gathered + r * message_size + states_size + sequence)
            tl.store(lengths + r * tl.num_programs(0) + sequence, length)


@dispatch.unspecialized(triton.jit)
def end_kernel(gathered, lengths, dend, grads_after, log_decay, cu_seqlens, first_boundary, segments_per_sequence,
               segment_rows, T, rank, ranks, parts, part_size: "i64", SIZE, BLOCK: tl.constexpr):  # fmt: skip
    sequence, head, H, col, inside, of_sequence = program_of(SIZE, BLOCK)
    rate = log2_decay(log_decay, head)
    state = tl.zeros([BLOCK], tl.float32)
    for r in range(0, ranks * (parts - 1)):  # none, or every rank's second part
        state += tl.load(gathered + (r * parts + 1) * part_size + of_sequence, mask=inside, other=0.0)
    for i in range(0, ranks - 1 - rank):
        r = ranks - 1 - i
        local = tl.load(gathered + r * parts * part_size + of_sequence, mask=inside, other=0.0)
        state = passed(state, local, rate, tl.load(lengths + r * tl.num_programs(0) + sequence))
    tl.store(dend + of_sequence, state, mask=inside)
    if grads_after is not None:
        begin, count = boundaries_of(first_boundary, segments_per_sequence, sequence)
        length = T
        if cu_seqlens is not None:
            length = (tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)).to(tl.int32)
        for i in range(0, count):
            where = grads_after + ((begin + i).to(tl.int64) * H + head) * SIZE + col
            local = tl.load(where, mask=inside, other=0.0)
            rows = tl.maximum(length - (i + 1) * segment_rows, 0)
            tl.store(where, passed(state, local, rate, rows), mask=inside)
