"""Launching kernels in a few microseconds: what Triton finds out in every call is found out once."""

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from inspect import getclosurevars, isbuiltin
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs

from lightning_attention.kernels.triton.launch import Layout, Tiles

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
    return tuple([None if x is None else x.dtype for x in tensors])  # a generator takes twice as long


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
        if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
            return run(*args)
        with torch.cuda.device(x.device):
            return run(*args)

    return launched


class Descriptor:
    """How the copy engine sees x, of the given layout, in blocks of C rows and ``width`` columns.

    What Triton's launcher reads of a tensor descriptor, without that class's checks: 5 µs each, and ten of them a
    backward pass.
    """

    __slots__ = ("base", "block_shape", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False  # asked for since Triton 3.7

    def __init__(self, x: Tensor, layout: Layout, C: int, width: int) -> None:
        self.base = x
        self.shape, self.strides = layout
        self.block_shape = [1, C, 1, width]

    def checked(self) -> Any:
        """Triton's own, which it asks for where it compiles."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        element = gl.bfloat16 if self.base.dtype == torch.bfloat16 else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for(self.block_shape, element)
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), self.block_shape, layout)


_launches: dict[tuple[int, tuple[Any, ...]], Callable[[tuple[int, int, int], int, Sequence[Any]], None]] = {}


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
    are compiled with the first of them: which one a call takes may depend on how much there is to do. Descriptors come
    first among ``args``.

    Triton looks at every argument of every call to find out whether it has compiled for the like of it, descriptors at
    greatest length: 70 µs forward and 400 backward. Here that happens once for each key.
    """
    launch = _launches.get((id(kernel), key))  # a kernel's own hash is that of its source
    if launch is not None:
        launch(grid, torch._C._cuda_getCurrentRawStream(key[0]), args)
        return
    named = constants()
    args = [x.checked() if isinstance(x, Descriptor) else x for x in args]
    compiled = kernel[grid](*args, **named, num_warps=4, **FUSION)
    if compiled is None:  # Triton's interpreter compiles nothing
        return
    _launches[id(kernel), key] = _launch(kernel, compiled, named)
    for other, named in siblings().items():
        if (id(kernel), other) not in _launches:
            compiled = kernel.warmup(*args, **named, grid=grid, num_warps=4, **FUSION)
            _launches[id(kernel), other] = _launch(kernel, compiled, named)


def _launch(kernel: Any, compiled: Any, constants: dict[str, Any]) -> Callable[..., None]:
    """What ``compiled[grid]`` does, less 4 µs of asking for the device and, with Triton 3.6, most of its Python."""
    values = tuple(constants[name] for name in kernel.arg_names if name in constants)
    execute = compiled.run  # loads it
    known = compiled.function, compiled.packed_metadata
    runtime = knobs.runtime
    direct = _below(execute)

    def launch(grid: tuple[int, int, int], stream: int, args: Sequence[Any]) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if enter.calls or leave.calls:  # a profiler's
            metadata = compiled.launch_metadata(grid, stream, *args, *values)
            execute(*grid, stream, *known, metadata, enter, leave, *args, *values)
        elif direct is None:
            execute(*grid, stream, *known, None, None, None, *args, *values)
        else:
            direct(grid, stream, *known, args, values)

    return launch


def _below(execute: Any) -> Callable[..., None] | None:
    """The C function below Triton 3.6's launcher, whose Python takes 7 µs of a forward pass and 15 of a backward.

    None for any other launcher, and for kernels that want scratch memory.
    """
    if not triton.__version__.startswith("3.6.") or type(execute).__name__ != "CudaLauncher":
        return None
    if execute.global_scratch_size or execute.profile_scratch_size:
        return None
    options = execute.launch_cooperative_grid, execute.launch_pdl, None, None
    start: Any = execute.launch
    described: tuple[Callable[..., tuple[Any, ...]], ...] = ()
    if not isbuiltin(start):  # it encodes descriptors
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        within = getclosurevars(start).nonlocals
        start = within["launcher"]
        described = tuple(
            _encoder((x["swizzle"], x["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[x["elem_type"]], x["block_size"]))
            for x in within["tensordesc_meta"]
        )
    count = len(described)

    def direct(
        grid: tuple[int, int, int],
        stream: int,
        function: int,
        packed: tuple[int, ...],
        args: Sequence[Any],
        values: tuple[Any, ...],
    ) -> None:
        descriptors: list[Any] = []
        for x, encoded in zip(args, described, strict=False):
            descriptors += encoded(x.base.data_ptr(), x.shape, x.strides)
        start(*grid, stream, function, *options, packed, None, None, None, *descriptors, *args[count:], *values)

    return direct


def _encoder(box: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """What a kernel takes for a descriptor: PyTorch hands out the same addresses again, and encoding takes 1 µs."""
    encode = triton.runtime.driver.active.utils.fill_tma_descriptor

    def encoded(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Any, ...]:
        return encode(address, *box, shape, strides, 0), *shape, *strides

    return lru_cache(maxsize=1024)(encoded)
