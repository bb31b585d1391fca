"""Which tile sizes a call gets, and into how many segments its sequences are cut. Decided from shapes, on the host.

Nothing is tuned at run time, and no size here depends on T, B or N but the number of segments, which is an ordinary
argument: a new length or batch compiles nothing.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import knobs

MIN_SEGMENT = 256  # no sequence is cut finer than this many rows


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
    if dtype.itemsize == 2:
        # Chips have 64 KB of shared memory (MI300), 99 (consumer cards) or more; at 256 two stages would take 104.
        if wide <= 128:
            return Tiles(False, 64, BD, BE, min(BD, 64), min(BE, 64), 4, 2, 1)
        return Tiles(False, 32, BD, BE, min(BD, 64), min(BE, 64), 8, 1, 1)
    C = 32 if wide <= 64 else 16
    return Tiles(False, C, BD, BE, min(BD, 32), min(BE, 32), 4, 2 if wide <= 128 else 1, 1)


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
    return _device(x.device.index) if x.is_cuda else ((0, 0), 1)  # the interpreter, on the CPU


def copyable(x: Tensor) -> bool:
    """Whether the copy engine can address x, of a 16-bit dtype: 16-byte base and strides."""
    b, t, h, _ = x.stride()
    if x.data_ptr() & 15:
        return False
    if not (b | t | h) & 7 and b * t * h > 0:
        return True
    B, T, H, _ = x.shape  # of one row, the stride does not matter
    return all(size == 1 or (stride & 7 == 0 and stride > 0) for size, stride in ((B, b), (T, t), (H, h)))


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


FUSION = {"enable_fp_fusion": True}  # said outright: Triton 3.9 warns where it is left to its default


def portable(
    kernel: Any, grid: tuple[int, int, int], args: Sequence[Any], constants: dict[str, Any], tiles: Tiles
) -> None:
    """Launch a kernel that Triton specializes."""
    kernel[grid](*args, **constants, num_warps=tiles.warps, **FUSION)


def dense(x: Tensor | None) -> Tensor | None:
    """An optional vector or mask as the kernels index it."""
    return None if x is None else x.contiguous()


def dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """What a kernel is compiled for, of arguments that may be absent."""
    return tuple(None if x is None else x.dtype for x in tensors)


_thread = threading.local()


def bind_context(x: Tensor) -> None:
    """Make the device's context current in this thread: encoding a descriptor needs one and does not make it.

    Autograd runs a backward pass in a thread of its own, whose first use of the device may be that. Any launch through
    the CUDA runtime does it, also while a graph is captured.
    """
    if getattr(_thread, "bound", None) != x.device:
        torch.zeros(1, device=x.device)
        _thread.bound = x.device


Result = TypeVar("Result")


def on_its_device(run: Callable[..., Result]) -> Callable[..., Result]:
    """Triton launches on the current device, which need not be the one that the tensors are on."""

    @wraps(run)
    def launched(*args: Any) -> Result:
        x = args[1] if args[0] is None else args[0]  # k where there is no q
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(x.device):
            return run(*args)

    return launched


class Descriptor:
    """How the copy engine sees x [B, T, H, *], in blocks of C rows and ``width`` columns; x must be ``copyable``.

    What Triton's launcher reads of a tensor descriptor, without that class's checks: 5 µs each, and ten of them a
    backward pass.
    """

    __slots__ = ("base", "block_shape", "padding", "shape", "strides")
    round_f32_to_tf32 = False  # asked for since Triton 3.7

    def __init__(self, x: Tensor, C: int, width: int) -> None:
        self.base = x
        self.shape = shape = list(x.shape)
        self.strides = strides = list(x.stride())
        self.block_shape = [1, C, 1, width]
        self.padding = "zero"
        for i in range(3):
            if shape[i] == 1:
                strides[i] = 8  # any that the engine takes

    def checked(self) -> Any:
        """Triton's own, which it asks for where it compiles."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        element = gl.bfloat16 if self.base.dtype == torch.bfloat16 else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for(self.block_shape, element)
        return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape, layout)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def run(
    kernel: Any,
    grid: tuple[int, int, int],
    args: Sequence[Any],
    key: tuple[Any, ...],
    constants: Callable[[], dict[str, Any]],
    siblings: Callable[[], dict[tuple[Any, ...], dict[str, Any]]] = dict,
) -> None:
    """Launch a kernel that specializes on nothing but ``key``, which decides its ``constants``.

    ``key`` begins with the index of the device, which is the current one. ``siblings``, other keys and their constants,
    are compiled with the first of them: which one a call takes may depend on how much there is to do.

    Triton looks at every argument of every call to find out whether it has compiled for the like of it, descriptors at
    greatest length: 70 µs forward and 400 backward. Here that happens once for each key. What is left is what
    ``compiled[grid]`` does, less 4 µs of asking for the device.
    """
    named_key = (id(kernel), *key)  # a kernel's own hash is that of its source
    known = _compiled.get(named_key)
    if known is not None:
        compiled, values = known
        stream = torch._C._cuda_getCurrentRawStream(key[0])
        enter, leave, metadata = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, None
        if enter.calls or leave.calls:  # a profiler's
            metadata = compiled.launch_metadata(grid, stream, *args, *values)
        else:
            enter = leave = None
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *args, *values)
        return
    named = constants()
    args = [x.checked() if isinstance(x, Descriptor) else x for x in args]
    compiled = kernel[grid](*args, **named, num_warps=4, **FUSION)
    if compiled is None:  # Triton's interpreter compiles nothing
        return
    _compiled[named_key] = compiled, _values(kernel, named)
    for other, named in siblings().items():
        if (id(kernel), *other) not in _compiled:
            compiled = kernel.warmup(*args, **named, grid=grid, num_warps=4, **FUSION)
            _compiled[(id(kernel), *other)] = compiled, _values(kernel, named)


def _values(kernel: Any, constants: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(constants[name] for name in kernel.arg_names if name in constants)
