"""Which tile sizes a call gets, and into how many segments its sequences are cut. Decided from shapes, on the host.

Nothing is tuned at run time, and no size here depends on T, B or N but the number of segments, which is an ordinary
argument: a new length or batch compiles nothing.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MIN_SEGMENT = 256  # no sequence is cut finer than this many rows
PIECES = 4  # of a segment, at most: a power of two


class Tiles(NamedTuple):
    """C rows a block, TD and TE columns of D and E a program; the whole widths are the next powers of two."""

    hopper: bool
    C: int
    BD: int
    BE: int
    TD: int
    TE: int
    warps: int
    stages: int
    per_multiprocessor: int


def _width(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@cache
def tiles(capability: tuple[int, int], D: int, E: int, dtype: torch.dtype, aligned: bool) -> Tiles:
    """The launch table, by architecture, D, E and dtype.

    ``aligned``: the copy engine can address every tensor (16-byte strides and bases).

    Raises:
        TypeError: dtype is float64.
        ValueError: D or E is over 256, where the state does not fit in registers.
    """
    if dtype.itemsize > 4:
        raise TypeError("q has dtype float64; backend 'triton' takes bfloat16, float16 and float32, 'tiled' all four")
    if max(D, E) > 256:
        raise ValueError(f"D is {D} and E {E}; backend 'triton' takes up to 256, 'tiled' any")
    BD, BE = _width(D), _width(E)
    wide = max(BD, BE)
    if capability[0] == 9 and dtype.itemsize == 2 and aligned and wide <= 128:
        BD, BE = max(BD, 64), max(BE, 64)
        # Two programs a multiprocessor: 96 KB each with two stages at 128, 88 KB with three at 64.
        stages = 2 if max(BD, BE) == 128 else 3
        return Tiles(True, 64, BD, BE, 64, 64, 4, stages, 2)
    # Chips have 64 KB of shared memory (MI300), 99 (consumer cards) or more. Of what fits there, sizes that compile
    # with no or few registers spilled to memory; AMD's have twice as many, Hopper's products need fewer.
    amd, small = capability[0] == 0, capability[0] in (8, 12)
    if dtype.itemsize == 2:
        if wide <= 64:
            return Tiles(False, 32 if small else 64, BD, BE, BD, BE, 4, 2, 1)
        if wide <= 128:
            return Tiles(False, 64, BD, BE, min(BD, 64), min(BE, 64), 4 if amd or capability[0] == 9 else 8, 2, 1)
        tile, warps = (32, 4) if amd else (64, 8)
        return Tiles(False, 32, BD, BE, min(BD, tile), min(BE, tile), warps, 1, 1)
    tile, warps = (32, 4) if amd or wide <= 128 else (16, 8)
    return Tiles(False, 16, BD, BE, min(BD, tile), min(BE, tile), warps, 2 if wide <= 128 else 1, 1)


def stages(tiles: Tiles, output: bool) -> int:
    """Blocks in flight; on Hopper twice as many where states alone are computed, which take less shared memory."""
    return tiles.stages if output or not tiles.hopper else 2 * tiles.stages


@cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:  # an MI300 calls itself 9.4, which is no Hopper
        return (0, 0), properties.multi_processor_count
    return (properties.major, properties.minor), properties.multi_processor_count


def device(x: Tensor) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors of the device that x is on."""
    return _device(x.get_device()) if x.is_cuda else ((0, 0), 1)  # the interpreter, on the CPU


class Layout(NamedTuple):
    """Shape [B, T, H, *] and strides, as the copy engine takes them."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Tiling(NamedTuple):
    """Tile sizes, how many programs run at once, and the layouts of tensors.

    inputs: of those asked about; outputs: of contiguous ones like k and like v.
    """

    tiles: Tiles
    places: int
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, Layout]


def tiling(*tensors: Tensor) -> Tiling:
    """Of q, k, v and others that programs copy."""
    bases = 0
    signature: list[tuple[int, ...]] = []
    for x in tensors:
        bases |= x.data_ptr()
        signature += (x.shape, x.stride())
    k = tensors[1]
    return _tiling(device(k), k.dtype, not bases & 15, *signature)


@lru_cache(maxsize=4096)
def _tiling(
    chip: tuple[tuple[int, int], int], dtype: torch.dtype, aligned: bool, *signature: tuple[int, ...]
) -> Tiling:
    shapes, strides = signature[::2], signature[1::2]
    outputs = [(shape, _contiguous(shape)) for shape in shapes[1:3]]
    layouts = [*zip(shapes, strides, strict=True), *outputs]
    aligned = aligned and all(_copyable(*layout) for layout in layouts)
    chosen = tiles(chip[0], shapes[1][3], shapes[2][3], dtype, aligned)
    of_inputs = tuple(_layout(*layout) for layout in layouts[:-2])
    return Tiling(chosen, chip[1] * chosen.per_multiprocessor, of_inputs, (_layout(*outputs[0]), _layout(*outputs[1])))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    _, T, H, width = shape
    return T * H * width, H * width, width, 1


def _copyable(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the copy engine can count through a tensor of a 16-bit dtype: of one row, the stride does not matter."""
    return all(
        size == 1 or (stride & 7 == 0 and stride > 0) for size, stride in zip(shape[:3], strides[:3], strict=True)
    )


def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    """Of one row, any stride that the engine takes."""
    return Layout(tuple(shape), (*(8 if shape[i] == 1 else strides[i] for i in range(3)), 1))


@lru_cache(maxsize=4096)
def segment_rows(programs: int, T: int, C: int, places: int) -> int:
    """Rows in a segment, a multiple of C, or at least T where sequences are not cut.

    ``programs`` is how many one segment of every sequence makes, ``places`` how many run at once. More segments fill
    the last wave better. Their price is measured (H200, D = 128, ALiBi decays): a pass over k and v for their states,
    0.1 of a wave, and the states' way through memory, as much as 1500 rows. At B 1, T 131072, H 32, 8 segments take
    1.37 ms forward, 4 take 1.40 and 32 take 1.58; at H 8, 16 take 0.43, 8 take 0.57 and 64 take 0.57.
    """
    best, rows = float("inf"), -(-T // C) * C
    for n in {1} | {waves * places // programs for waves in range(1, 17)}:
        length = -(-T // max(n, 1))
        length = -(-length // C) * C
        if n < 1 or (n > 1 and length < MIN_SEGMENT):
            continue
        waves = -(-n * programs // places)
        cost = waves * places / (n * programs)
        if n > 1:
            cost *= 1 + 0.1 / waves + 1500 / length
        if cost < best:
            best, rows = cost, length
    return rows


def piece_rows(rows: int, width: int) -> int:
    """Rows in each piece of a segment of so many ``rows``, whose own state is computed piece by piece.

    The few heads that decay slowly have most of the work: in one piece each they take 0.2 ms for 16384 rows, D = 128,
    while the chip is idle. ``width``, the larger of D and E, bounds what the pieces' states take in memory: 3 % of q,
    k, v, o and their gradients.
    """
    pieces = max(1, min(PIECES, rows // (16 * width)))
    return -(-rows // pieces // 64) * 64
