"""Which tile sizes a call gets, and into how many segments its sequences are split. Decided from shapes, on the host.

Nothing is tuned at run time, and no size here depends on T, B or N but the number of segments, which is an ordinary
argument: a new length or batch compiles nothing.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret  # settled when the kernels are imported, as it is for them
MIN_SEGMENT = 256  # no sequence is split into segments of fewer rows
HOPPER_WIDTHS = (64, 80, 96, 128, 144, 160, 192, 256)
PIECES = 4  # of a segment, at most: a power of two


class Tiles(NamedTuple):
    """Which of ``sweeps``, and its sizes: C rows a block, TD and TE columns of D and E a program.

    BD and BE are the next powers of two, BE of ``widest_part``.

    even_*: whether these cover the columns without a rest. precision: of float32 products, as ``tl.dot`` has it; bf16x3
    and bf16x6 are those of two and of three bfloat16 parts. lazy: whether states are carried lazily
    (``numerics.advance``): where their bits matter, and need not be those of two calls one after the other. group:
    heads of v to a head of q and k. columns_first: whether the states of a pool lie in memory as [E, D]. Kernels get
    all of this as one constant.
    """

    sweep: str
    C: int
    BD: int
    BE: int
    TD: int
    TE: int
    warps: int
    stages: int
    per_multiprocessor: int
    even_BD: bool = False
    even_BE: bool = False
    even_TD: bool = False
    even_TE: bool = False
    precision: str = "tf32"
    lazy: bool = False
    group: int = 1
    columns_first: bool = False


class Float32(NamedTuple):
    """How float32 is multiplied, and in which tiles: ``columns`` of D or E a program; the rest as in ``Tiles``."""

    precision: str
    C: int
    columns: int
    warps: int
    stages: int
    per_multiprocessor: int


#: On Hopper, D and E up to 128, where the sweep for float32 is of no use: for tensors that the copy engine cannot
#: address, and backward where log_decay has a gradient. By whether products are exact and whether the pass is a
#: backward one. Exact ones of three TF32 products take a third of the time that float32's own multipliers take: at 2,
#: 8192, 16, 128 1.42 and 5.00 ms for 4.3 and 16.1, with an error of 4.5e-7 for 2.6e-7. In TF32 it is 0.62 and 1.93 ms.
HOPPER_FLOAT32 = {
    (True, False): Float32("tf32x3", 16, 32, 4, 2, 2),
    (True, True): Float32("tf32x3", 16, 32, 4, 2, 2),
    (False, False): Float32("tf32", 32, 32, 4, 2, 2),
    (False, True): Float32("tf32", 16, 32, 4, 2, 3),
}


def padded(size: int) -> int:
    """The power of two that a width is padded to."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def refusal(D: int, dtype: torch.dtype) -> Exception | None:
    """Why the kernels do not take such a call: a program has all D rows of some columns of a state in registers."""
    if dtype.itemsize > 4:
        return TypeError("q has dtype float64; backend 'triton' takes bfloat16, float16 and float32, 'tiled' all four")
    if dtype == torch.bfloat16 and INTERPRETED:
        return TypeError(
            "q has dtype bfloat16; Triton's interpreter, which multiplies it wrong, takes float16 and float32"
        )
    if D > 256:
        return ValueError(f"D is {D}; backend 'triton' takes up to 256, 'tiled' any")
    return None


def widest_part(D: int, E: int, learned: bool = False) -> int:
    """Columns of v, at most, that the sweeps for dq and dk take at once: all E, or parts of as many as D is padded to.

    The columns are independent: other sweeps take any number in tiles, these two want all of a row in registers. Where
    the decay is ``learned``, they have two states there, and half as many columns.
    """
    if learned:
        return min(E, 128)
    return E if E <= 256 else max(128, padded(D))


@cache
def tiles(
    capability: tuple[int, int], D: int, E: int, dtype: torch.dtype, aligned: bool, exact: bool = False,
    backward: bool = False, learned: bool = False,
) -> Tiles:  # fmt: skip
    """The launch table, by architecture, D, E, dtype and direction.

    ``aligned``: the copy engine can address every tensor (16-byte strides and bases). ``exact``: float32 is multiplied
    as float32, not as TF32. ``learned``: a backward pass gives the gradient of log_decay, too.
    """
    BD, BE = padded(D), padded(widest_part(D, E))
    wide = max(BD, BE)
    if capability[0] == 9 and dtype.itemsize == 2 and aligned:
        return hopper_tiles(D, E, backward)
    if capability[0] == 9 and aligned and not learned and (wide if backward else BD) <= 128:
        return hopper_float32_tiles(max(64, BD), max(64, BE), exact, backward)
    # Chips have 64 KB of shared memory (MI300), 99 (consumer cards) or more. These sizes fit there, and compile
    # with no or few registers spilled to memory; AMD's have twice as many, Hopper's products need fewer.
    amd, small = capability[0] == 0, capability[0] in (8, 12)
    precision, per_multiprocessor = "ieee" if exact else "tf32", 1
    if dtype.itemsize == 4 and capability[0] == 9 and wide <= 128:
        precision, C, tile, warps, stages, per_multiprocessor = HOPPER_FLOAT32[exact, backward]
    elif dtype.itemsize == 4:
        C, tile, warps, stages = 16, 16, 8, 2 if wide <= 128 else 1
        if amd or wide <= 128:
            tile, warps = 32, 4
    elif wide <= 64:
        C, tile, warps, stages = 32 if small else 64, 64, 4, 2
    elif wide <= 128:
        C, tile, warps, stages = 64, 64, 4 if amd or capability[0] == 9 else 8, 2
    else:
        C, tile, warps, stages = 32, 64, 8, 1
        if amd:
            tile, warps = 32, 4
    TD, TE = min(BD, tile), min(BE, tile)
    even = BD == D, BE == E, D % TD == 0, E % TE == 0
    return Tiles("portable", C, BD, BE, TD, TE, warps, stages, per_multiprocessor, *even, precision)


def hopper_tiles(D: int, E: int, backward: bool) -> Tiles:
    """Tiles for 16 bits on Hopper, whose widths are the sum of two powers of two: 80 is 64 and 16.

    Two programs of four warps on a multiprocessor, with 64 columns each, or one of eight with 128. The second computes
    the scores once where the first do it twice: backward at 128 it takes 0.90 of the time (4, 8192, 32), forward the
    same, and with few heads more of it. States of over 128 columns take half of the registers that a program may have.
    Stages are what fits, or what was fastest: at 96 forward 0.245 ms with two, 0.273 with three; at 80 0.223 and 0.209.
    """
    BD, BE = (min(width for width in HOPPER_WIDTHS if width >= size) for size in (D, widest_part(D, E)))
    wide = max(BD, BE) if backward else BD  # forward nobody has all columns of E
    if wide > 128 or (backward and wide > 64):
        return Tiles("hopper", 64, BD, BE, 128, 128, 8, {80: 4, 96: 4, 256: 2}.get(wide, 3), 1)
    return Tiles("hopper", 64, BD, BE, 64, 64, 4, 3 if wide <= 80 else 2, 2)


def hopper_float32_tiles(BD: int, BE: int, exact: bool, backward: bool) -> Tiles:
    """Tiles for float32 on Hopper, D and E up to 128: one program of eight warps on a multiprocessor, or two of four.

    Stages are those of c, what was fastest: one is 6 % slower than two forward at 128, and 3 % faster backward in TF32;
    at 64 it is 4 to 6 % faster with exact products, and 1 to 5 % slower in TF32.
    """
    precision = "bf16x6" if exact else "bf16x3"
    if (max(BD, BE) if backward else BD) > 64:
        stages = 1 if backward and not exact else 2
        return Tiles("hopper_float32", 64, BD, BE, 128, 128, 8, stages, 1, precision=precision)
    return Tiles("hopper_float32", 64, BD, BE, 64, 64, 4, 1 if exact else 2, 2, precision=precision)


def with_decay_gradient(tiles: Tiles) -> Tiles:
    """The tiles where sweeps read one more: with fewer stages, if Hopper's shared memory has no room for all."""
    if tiles.sweep != "hopper" or tiles.per_multiprocessor > 1:
        return tiles
    a_row = 2 * (2 * max(tiles.BD, tiles.BE) + 2 * tiles.TD)
    room = (226 << 10) - 2 * tiles.C * (tiles.C + tiles.TD)
    return tiles._replace(stages=min(tiles.stages, room // (tiles.C * a_row)))


@cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:  # an MI300 calls itself 9.4, which is no Hopper
        return (0, 0), properties.multi_processor_count
    return (properties.major, properties.minor), properties.multi_processor_count


def device(x: Tensor) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors of the device that x is on."""
    return _device(x.get_device()) if x.is_cuda else ((0, 0), 1)  # the interpreter, on the CPU


def columns_at_once(k: Tensor, v: Tensor, learned: bool) -> int:
    """Columns of v, at most, that one backward pass takes.

    They are ``widest_part``, and in float32 on Hopper no more than the sweep for float32 has: two parts in it take less
    than one pass of the portable sweep.
    """
    D, E = k.shape[3], v.shape[3]
    if k.dtype == torch.float32 and D <= 128 and device(k)[0][0] == 9:
        return min(E, 128)
    return widest_part(D, E, learned)


class TensorView(NamedTuple):
    """Shape [B, T, H, *] and strides, as the copy engine takes them."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Tiling(NamedTuple):
    """Tile sizes, how many programs run at once, and the views of tensors.

    inputs: of those asked about; outputs: of contiguous ones [B, T, H, D] and [B, T, H, E].
    """

    tiles: Tiles
    resident_programs: int
    inputs: tuple[TensorView, ...]
    outputs: tuple[TensorView, TensorView]


def tiling(
    *tensors: Tensor, batch_invariant: bool = False, backward: bool = False, learned: bool = False,
    out: Tensor | None = None,
) -> Tiling:  # fmt: skip
    """The tiling for q, k and v, or k and v alone, and others that programs copy; ``out``: where outputs go, if given.

    Raises:
        TypeError: dtype is float64.
        ValueError: D is over 256.
    """
    bases = 0 if out is None else out.data_ptr()
    signature: list[tuple[int, ...]] = []
    for x in tensors:
        bases |= x.data_ptr()
        signature += (x.shape, x.stride())
    k = tensors[1]
    exact = k.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    lazy = exact and not batch_invariant
    return _tiling(device(k), k.dtype, not bases & 15, exact, lazy, backward, learned, *signature)


@lru_cache(maxsize=4096)
def _tiling(
    chip: tuple[tuple[int, int], int], dtype: torch.dtype, aligned: bool, exact: bool, lazy: bool,
    backward: bool, learned: bool, *signature: tuple[int, ...],
) -> Tiling:  # fmt: skip
    shapes, strides = signature[::2], signature[1::2]
    (B, T, H, E), D = shapes[2], shapes[1][3]
    outputs = [(shape, _contiguous(shape)) for shape in ((B, T, H, D), (B, T, H, E))]
    tensors = [*zip(shapes, strides, strict=True), *outputs]
    refused = refusal(D, dtype)
    if refused is not None:
        raise refused
    aligned = aligned and all(_copyable(*tensor, 16 // dtype.itemsize) for tensor in tensors)
    chosen = tiles(chip[0], D, E, dtype, aligned, exact, backward, learned)._replace(lazy=lazy, group=H // shapes[1][2])
    *inputs, like_k, like_v = [_view(*tensor) for tensor in tensors]
    return Tiling(chosen, chip[1] * chosen.per_multiprocessor, tuple(inputs), (like_k, like_v))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    _, T, H, width = shape
    return T * H * width, H * width, width, 1


def _copyable(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> bool:
    """Whether the copy engine can count through a tensor by ``unit`` numbers: of one row, the stride does not matter.

    An odd width is refused of one row too: a sequence of one token, whose bits may have to be those of longer ones.
    """
    return shape[3] % unit == 0 and all(
        size == 1 or (stride % unit == 0 and stride > 0) for size, stride in zip(shape[:3], strides[:3], strict=True)
    )


def _view(shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorView:
    """Where there is one row, any stride that the engine takes."""
    return TensorView(tuple(shape), (*(8 if shape[i] == 1 else strides[i] for i in range(3)), 1))


@lru_cache(maxsize=4096)
def segment_rows(programs: int, T: int, C: int, resident_programs: int) -> int:
    """Rows in a segment, a multiple of C, or at least T where sequences are not split.

    ``programs`` is how many one segment of every sequence makes, ``resident_programs`` how many run at once. More
    segments fill the last wave better. Their price is measured (H200, D = 128, ALiBi decays): a pass over k and v for
    their states, a tenth, and the states' way through memory, as much as 1500 rows. At B 1, T 131072, H 32, 4 segments
    take 1.16 ms forward, 8 take 1.22 and 12 take 1.27; at H 8, 16 take 0.36, 11 take 0.41 and 33 take 0.41.
    """
    best, rows = float("inf"), -(-T // C) * C
    for n in {1} | {waves * resident_programs // programs for waves in range(1, 17)}:
        length = -(-T // max(n, 1))
        length = -(-length // C) * C
        if n < 1 or (n > 1 and length < MIN_SEGMENT):
            continue
        waves = -(-n * programs // resident_programs)
        cost = waves * resident_programs / (n * programs)
        if n > 1:
            cost *= 1.1 + 1500 / length
        if cost < best:
            best, rows = cost, length
    return rows


def piece_rows(rows: int, width: int) -> int:
    """Rows in each piece of a segment of so many ``rows``, whose own state is computed piece by piece.

    The few heads that decay slowly have most of the work: in one piece each they take 0.2 ms for 16384 rows, D = 128,
    while the chip is idle. ``width``, the larger of D and E, bounds what the pieces' states take in memory: 6 % of q,
    k, v, o and their gradients, and 3 % at 128. At 2, 8192, 16, 256 two pieces take 46 µs, one 85.
    """
    pieces = max(1, min(PIECES, rows // (8 * width)))
    return -(-rows // pieces // 64) * 64
