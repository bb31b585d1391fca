"""Which tile sizes a call gets, and into how many segments its sequences are cut. Decided from shapes, on the host.

Nothing is tuned at run time, and no size here depends on T, B or N but the number of segments, which is an ordinary
argument: a new length or batch compiles nothing.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MIN_SEGMENT = 256  # no sequence is cut finer than this many rows


@dataclass(frozen=True)
class Tiles:
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
    """
    BD, BE = _width(D), _width(E)
    wide = max(BD, BE)
    if capability[0] == 9 and dtype.itemsize == 2 and aligned and wide <= 128:
        BD, BE = max(BD, 64), max(BE, 64)
        # Two programs a multiprocessor: 96 KB each with two stages at 128, 88 KB with three at 64.
        stages = 2 if max(BD, BE) == 128 else 3
        return Tiles(True, 64, BD, BE, 64, 64, 4, stages, 2)
    if dtype.itemsize == 2:
        # 99 KB of shared memory is the least that the supported chips have.
        C = 64 if wide <= 128 else 32
        return Tiles(False, C, BD, BE, min(BD, 64), min(BE, 64), 4 if wide <= 128 else 8, 2, 1)
    C = 32 if wide <= 64 else 16
    return Tiles(False, C, BD, BE, min(BD, 32), min(BE, 32), 4, 2 if wide <= 128 else 1, 1)


@cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def device(x: Tensor) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors of the device that x is on."""
    return _device(x.device.index) if x.is_cuda else ((0, 0), 1)  # the interpreter, on the CPU


def copyable(x: Tensor) -> bool:
    """Whether the copy engine can address x: 16-byte base and strides."""
    B, T, H, _ = x.shape
    b, t, h, _ = x.stride()
    fits = (t % 8 == 0 and t > 0) or T == 1
    return fits and ((h % 8 == 0 and h > 0) or H == 1) and ((b % 8 == 0 and b > 0) or B == 1) and x.data_ptr() % 16 == 0


def segment_rows(programs: int, T: int, C: int, places: int) -> int:
    """Rows in a segment, a multiple of C, or at least T for none.

    ``programs`` is how many one segment of every sequence makes, ``places`` how many run at once. Segments are worth
    their states (a pass over k and v, cut short where the decay forgets) where the last wave of programs would leave
    much of the chip idle.
    """
    best, count = 0.0, 1
    for waves in (1, 2, 3, 4):
        n = min(waves * places // programs, max(T // MIN_SEGMENT, 1))
        if n < 1:
            continue
        used = n * programs / (-(-n * programs // places) * places)
        used *= 1.0 if n == 1 else 0.9
        if used > best + 0.02:
            best, count = used, n
    if best == 0.0:
        return -(-T // C) * C
    rows = -(-T // count)
    return -(-rows // C) * C
