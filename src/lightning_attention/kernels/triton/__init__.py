"""The operations in Triton and Gluon kernels.

From a call to a kernel:

    attention, decode, prefill, sequence_parallel,
    speculative, states, recent                       the operations: which kernels run, over which buffers
    tiling, plan                                      how large tiles are; how sequences are split into segments
    dispatch                                          launching a kernel in a few microseconds
    recording                                         the launches of a call, made again when its shapes come again
    sweeps/portable, sweeps/hopper                    the loop over the blocks of a sequence, and the kernels made of it
    roles                                             what each program of those kernels does, whatever the sweep
    recurrent, ring, planes                           the kernels that go token by token, over states in a pool
    ring_decode, ring_verify, ring_commit,
    state_commit, ring_planes, nvidia                 those that do the same in Gluon, and their launches
    scan, padding, fold, cross_entropy, matmul,
    projection, quantized                             a kernel or three each, with the functions that launch them
    work, numerics                                    what kernels of all kinds compute: which rows, which powers

Words that mean one thing here:

    block               C consecutive rows (tokens) of a sequence, multiplied as matrices
    sweep               a pass over the blocks of a segment with the state in registers, forward or with time reversed
    tile                the columns that one program has: TD of D or TE of E; BD and BE are D and E, padded
    segment             consecutive blocks of a sequence that one program sweeps; all of it, unless sequences are split
    piece               a part of a segment, whose local state is computed by a program of its own
    local state         what a piece or a segment leaves when it starts from zero
    boundary state      the state between two segments of a sequence, or its gradient; boundary index: which of them
    plan                how the sequences of a call are split: its segments, in a table where lengths are on the device
    document            a sequence of a packed batch that is swept as one sequence, with masks between documents
    border              where a row's document begins or, with time reversed, ends (the row past its last)
    whole sequence      said of a segment: its sequence has no other, so it starts from the initial state
    role                which of a backward pass's sweeps a program does: for dq, dk or dv
    resident programs   as many as the chip runs at once; segments in flight: as many as a persistent kernel sweeps
    pool, slot          states of many sequences, [S, H, D, E], and the row of it that a sequence owns
    rate                a head's decay a token as a power of two, log2 λ
    whole, rest         a power of the decay as the sum of 1 or 0 and what is left (``numerics.whole_and_rest``)
"""
