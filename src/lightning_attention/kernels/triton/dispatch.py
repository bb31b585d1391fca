"""Launching kernels in a few microseconds: what Triton finds out in every call is found out once."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from inspect import getclosurevars, isbuiltin, signature
from itertools import repeat
from operator import itemgetter
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs

from lightning_attention.kernels.triton.tiling import TensorView

FUSION = {"enable_fp_fusion": True}  # said outright: Triton 3.9 warns where it is left to its default

_logger = logging.getLogger(__name__)


def dense(x: Tensor | None) -> Tensor | None:
    """An optional vector or mask as the kernels index it."""
    return None if x is None else x.contiguous()


_thread = threading.local()


def bind_context(device: int) -> None:
    """Make the device's context current in this thread: encoding a descriptor needs one and does not make it.

    Autograd runs a backward pass in a thread of its own, whose first use of the device may be that. Any launch through
    the CUDA runtime does it, also while a graph is captured.
    """
    if device >= 0:  # the interpreter has tensors on the CPU
        torch.zeros(1, device=torch.device("cuda", device))
    _thread.bound = device


Result = TypeVar("Result")


def on_its_device(run: Callable[..., Result]) -> Callable[..., Result]:
    """Triton launches on the current device, which need not be the one that the tensors are on."""

    @wraps(run)
    def launched(*args: Any) -> Result:
        x = args[0]
        if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
            return run(*args)
        with torch.cuda.device(x.device):
            return run(*args)

    return launched


class Descriptor:
    """How the copy engine sees x in blocks of C rows and ``width`` columns.

    What Triton's launcher reads of a tensor descriptor, without that class's checks: 5 µs each, and ten of them a
    backward pass.
    """

    __slots__ = ("base", "block_shape", "dtype", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False  # asked for since Triton 3.7

    def __init__(self, x: Tensor, view: TensorView, C: int, width: int) -> None:
        self.base, self.dtype = x, x.dtype
        self.shape, self.strides = view
        self.block_shape = [1, C, 1, width]

    def checked(self) -> Any:
        """Triton's own, which it asks for where it compiles."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        element = gl.bfloat16 if self.base.dtype == torch.bfloat16 else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for(self.block_shape, element)
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), self.block_shape, layout)


def specialized(
    kernel: Any,
    grid: tuple[int, int, int],
    args: Sequence[Any],
    constants: tuple[Any, ...],
    warps: int,
    device: int,  # noqa: ARG001
) -> None:
    """Launch a kernel that Triton specializes on whatever it finds out about the arguments."""
    kernel[grid](*args, *constants, num_warps=warps, **FUSION)


def unspecialized(jit: Any) -> Callable[[Callable[..., None]], Any]:
    """Compile a kernel once for all numbers and addresses; for ``run``."""

    def decorate(function: Callable[..., None]) -> Any:
        names = [
            name for name, parameter in signature(function).parameters.items() if not _is_constant(parameter.annotation)
        ]
        return jit(do_not_specialize=names)(function)

    return decorate


def _is_constant(annotation: Any) -> bool:
    return annotation is triton.language.constexpr or annotation == "tl.constexpr"


def signature_of(kernel: Any, args: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What the kernel is compiled for, of calls with arguments like these: their types, and the alignment of some."""
    # A number never takes a tensor's place. None may, and the first call need not tell: it counts as a tensor.
    numbers = [i for i, x in enumerate(args) if isinstance(x, int | float)]
    tensors = [i for i in range(len(args)) if i not in numbers]
    parameters = getattr(kernel, "params", ())  # Triton's interpreter has none
    aligned = [i for i, x in enumerate(parameters[: len(args)]) if not x.do_not_specialize]
    tensors_of = itemgetter(*tensors)
    aligned_tensors = [i for i in tensors if i in aligned and isinstance(args[i], Tensor)]
    aligned_numbers = [i for i in numbers if i in aligned and isinstance(args[i], int)]

    def types(args: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(map(getattr, tensors_of(args), _DTYPE, _ABSENT))  # a comprehension takes three times as long

    def types_and_alignment(args: Sequence[Any]) -> tuple[Any, ...]:
        return (
            *types(args),
            *[args[i].data_ptr() & 15 == 0 for i in aligned_tensors],
            *[args[i] & 15 and 1 + (args[i] == 1) for i in aligned_numbers],  # Triton takes 1 for a constant
        )

    return types_and_alignment if aligned_tensors or aligned_numbers else types


_DTYPE, _ABSENT = repeat("dtype"), repeat(None)
_signatures: dict[int, Callable[[Sequence[Any]], tuple[Any, ...]]] = {}
_launches: dict[tuple[Any, ...], Callable[[tuple[int, int, int], int, Sequence[Any]], None]] = {}


def run(
    kernel: Any, grid: tuple[int, int, int], args: Sequence[Any], constants: tuple[Any, ...], warps: int, device: int,
    siblings: Callable[[], Sequence[tuple[Any, ...]]] = tuple,
) -> None:  # fmt: skip
    """Launch a kernel that is ``unspecialized``, on the current device; ``constants``: its last arguments.

    Other ``siblings``, constants like these, are compiled with the first of them: which a call takes may depend on how
    much there is to do.

    Triton looks at every argument of every call to find out whether it has compiled for the like of it, descriptors at
    greatest length: 70 µs forward and 400 backward. Here a kernel is found by the types of its arguments.
    """
    if getattr(_thread, "bound", None) != device:
        bind_context(device)
    name = id(kernel)  # a kernel's own hash is that of its source
    found = _signatures.get(name)
    if found is None:
        found = _signatures[name] = signature_of(kernel, args)
    key = found(args)
    launch = _launches.get((name, device, constants, key))
    if launch is not None:
        launch(grid, torch._C._cuda_getCurrentRawStream(device), args)
        return
    checked = [x.checked() if isinstance(x, Descriptor) else x for x in args]
    compiled = kernel[grid](*checked, *constants, num_warps=warps, **FUSION)
    if compiled is None:  # Triton's interpreter compiles nothing
        return
    _launches[name, device, constants, key] = _launch(compiled, constants, args)
    for others in siblings():
        if (name, device, others, key) not in _launches:
            compiled = kernel.warmup(*checked, *others, grid=grid, num_warps=warps, **FUSION)
            _launches[name, device, others, key] = _launch(compiled, others, args)


def _launch(compiled: Any, constants: tuple[Any, ...], first: Sequence[Any]) -> Callable[..., None]:
    """What ``compiled[grid]`` does for arguments like the ``first``.

    Less 4 µs of asking for the device and, with Triton 3.6, most of its Python.
    """
    execute = compiled.run  # loads it
    known = compiled.function, compiled.packed_metadata
    runtime = knobs.runtime
    direct = _below(execute, [i for i, x in enumerate(first) if isinstance(x, Descriptor)])

    def launch(grid: tuple[int, int, int], stream: int, args: Sequence[Any]) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if enter.calls or leave.calls:  # a profiler's
            metadata = compiled.launch_metadata(grid, stream, *args, *constants)
            execute(*grid, stream, *known, metadata, enter, leave, *args, *constants)
        elif direct is None:
            execute(*grid, stream, *known, None, None, None, *args, *constants)
        else:
            direct(grid, stream, *known, args, constants)

    return launch


def _below(execute: Any, descriptors: list[int]) -> Callable[..., None] | None:
    """The C function below Triton 3.6's launcher, whose Python takes 7 µs of a forward pass and 15 of a backward.

    None for any other launcher, and for kernels that want scratch memory.
    """
    if not triton.__version__.startswith("3.6.") or type(execute).__name__ != "CudaLauncher":
        return None
    if execute.global_scratch_size or execute.profile_scratch_size:
        return None
    options = execute.launch_cooperative_grid, execute.launch_pdl, None, None
    start: Any = execute.launch
    boxes: list[tuple[Any, ...]] = []
    if not isbuiltin(start):  # it encodes descriptors
        within = encoding_launcher(start)
        if within is None:
            return None
        start, boxes = within
    encoders = list(zip(descriptors, map(_encoder, boxes), strict=True))

    def direct(
        grid: tuple[int, int, int], stream: int, function: int, packed: tuple[int, ...], args: Sequence[Any],
        constants: tuple[Any, ...],
    ) -> None:  # fmt: skip
        flat: list[Any] = []
        done = 0
        for position, encoded in encoders:
            x = args[position]
            flat += args[done:position]
            flat += encoded(x.base.data_ptr(), x.shape, x.strides)
            done = position + 1
        start(*grid, stream, function, *options, packed, None, None, None, *flat, *args[done:], *constants)

    return direct


def encoding_launcher(start: Any) -> tuple[Any, list[tuple[Any, ...]]] | None:
    """What Triton 3.6 wraps to encode descriptors: the launcher below, and for each descriptor what it is encoded with.

    None, and a warning in the log, where the wrapper is not the one that this was read from.
    """
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    within = getclosurevars(start).nonlocals
    try:
        boxes = [
            (x["swizzle"], x["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[x["elem_type"]], x["block_size"])
            for x in within["tensordesc_meta"]
        ]
        return within["launcher"], boxes
    except (KeyError, TypeError) as error:
        _logger.warning(
            "Triton %s launches kernels in a way that is not known here (%s is not found): every launch takes 7 to "
            "15 µs longer",
            triton.__version__,
            error,
        )
        return None


def _encoder(box: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """What a kernel takes for a descriptor: PyTorch hands out the same addresses again, and encoding takes 1 µs."""
    encode = triton.runtime.driver.active.utils.fill_tma_descriptor

    def encoded(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Any, ...]:
        return encode(address, *box, shape, strides, 0), *shape, *strides

    return lru_cache(maxsize=1024)(encoded)
