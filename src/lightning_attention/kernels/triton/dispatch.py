"""Launching kernels in a few microseconds: what Triton finds out in every call is found out once."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache, partial, wraps
from inspect import getclosurevars, isbuiltin, signature
from itertools import repeat
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

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


def with_unit_rows(x: Tensor) -> Tensor:
    """An output's gradient as the kernels read it: with a unit last stride, and none that repeats numbers."""
    return x.contiguous() if x.stride(-1) != 1 or 0 in x.stride() else x


_thread = threading.local()


def bind_context(device: int) -> None:
    """Make the device's context current in this thread: encoding a descriptor needs one and does not make it.

    Autograd runs a backward pass in a thread of its own, whose first use of the device may be that. Any launch through
    the CUDA runtime does it, also while a graph is captured.
    """
    if device >= 0:  # the interpreter has tensors on the CPU
        torch.zeros(1, device=torch.device("cuda", device))
    _thread.bound = device


def ensure_context(device: int) -> None:
    """``bind_context`` where it was not done in this thread."""
    if getattr(_thread, "bound", None) != device:
        bind_context(device)


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


class _Address(NamedTuple):
    """What Triton's launcher asks of a tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Descriptor:
    """How the copy engine sees x in blocks of C rows and ``width`` columns.

    What Triton's launcher reads of a tensor descriptor, without that class's checks: 5 µs each, and ten of them a
    backward pass.
    """

    __slots__ = ("base", "block_shape", "dtype", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False  # asked for since Triton 3.7

    def __init__(self, x: Tensor, view: TensorView, C: int, width: int) -> None:
        self.base: Any = x
        self.dtype = x.dtype
        self.shape, self.strides = view
        self.block_shape = [1, C, 1, width]

    def at(self, address: int) -> "Descriptor":
        """The same of a tensor that begins there."""
        other: Descriptor = copy(self)
        other.base = _Address(address)
        return other

    def checked(self) -> Any:
        """Triton's own, which it asks for where it compiles."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[self.dtype]
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
    compiled = kernel[grid](*args, *constants, num_warps=warps, **FUSION)
    recorder = getattr(_thread, "recorder", None)
    if recorder is not None:
        recorder.launched(Launch(compiled, constants, args), grid, args)


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
_launches: dict[tuple[Any, ...], "Launch"] = {}


def run(
    kernel: Any, grid: tuple[int, int, int], args: Sequence[Any], constants: tuple[Any, ...], warps: int, device: int,
    siblings: Callable[[], Sequence[tuple[Any, ...]]] = tuple,
    registers: Callable[[tuple[Any, ...]], int] = lambda constants: 0,  # noqa: ARG005
) -> None:  # fmt: skip
    """Launch a kernel that is ``unspecialized``, on the current device; ``constants``: its last arguments.

    Other ``siblings``, constants like these, are compiled with the first of them: which a call takes may depend on how
    much there is to do. ``registers``: how many a thread may have of a kernel with these constants, on an NVIDIA chip;
    0: as many as the compiler likes.

    Triton looks at every argument of every call to find out whether it has compiled for the like of it, descriptors at
    greatest length: 70 µs forward and 400 backward. Here a kernel is found by the types of its arguments.
    """
    ensure_context(device)
    name = id(kernel)  # a kernel's own hash is that of its source
    found = _signatures.get(name)
    if found is None:
        found = _signatures[name] = signature_of(kernel, args)
    key = found(args)
    launch = _launches.get((name, device, constants, key))
    recorder = getattr(_thread, "recorder", None)
    if recorder is not None:
        recorder.launched(launch, grid, args)
    if launch is not None:
        launch(grid, torch._C._cuda_getCurrentRawStream(device), args)
        return
    checked = [x.checked() if isinstance(x, Descriptor) else x for x in args]

    def options(constants: tuple[Any, ...]) -> dict[str, Any]:
        most = registers(constants)
        return {"num_warps": warps, **FUSION, **({"maxnreg": most} if most else {})}

    compiled = kernel[grid](*checked, *constants, **options(constants))
    if compiled is None:  # Triton's interpreter compiles nothing
        return
    _launches[name, device, constants, key] = Launch(compiled, constants, args)
    for others in siblings():
        if (name, device, others, key) not in _launches:
            compiled = kernel.warmup(*checked, *others, grid=grid, **options(others))
            _launches[name, device, others, key] = Launch(compiled, others, args)


class _Below(NamedTuple):
    """The C function below a launcher: what it takes before the kernel's arguments, and each descriptor's encoder."""

    start: Any
    before: tuple[Any, ...]
    encoders: dict[int, Callable[..., tuple[Any, ...]]]


#: Launches the same on a stream, over tensors at these addresses; the last argument has those that the call allocated.
Again = Callable[[int, Sequence[int], list[Any]], None]


class Launch:
    """What ``compiled[grid]`` does for arguments like the ``first``.

    Less 4 µs of asking for the device and, with Triton 3.6, most of its Python.
    """

    def __init__(self, compiled: Any, constants: tuple[Any, ...], first: Sequence[Any]) -> None:
        self.compiled, self.constants = compiled, constants
        self.execute = compiled.run  # loads it
        self.known = compiled.function, compiled.packed_metadata
        self.below = _below(self.execute, *self.known, [i for i, x in enumerate(first) if isinstance(x, Descriptor)])

    def __call__(self, grid: tuple[int, int, int], stream: int, args: Sequence[Any]) -> None:
        if hooked():
            enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            metadata = self.compiled.launch_metadata(grid, stream, *args, *self.constants)
            self.execute(*grid, stream, *self.known, metadata, enter, leave, *args, *self.constants)
            return
        if self.below is None:
            self.execute(*grid, stream, *self.known, None, None, None, *args, *self.constants)
            return
        flat: list[Any] = []
        done = 0
        for position, encoded in self.below.encoders.items():
            x = args[position]
            flat += args[done:position]
            flat += encoded(x.base.data_ptr(), x.shape, x.strides)
            done = position + 1
        self.below.start(*grid, stream, *self.below.before, *flat, *args[done:], *self.constants)

    def again(
        self, grid: tuple[int, int, int], args: Sequence[Any], place: Callable[[Tensor], tuple[int, int]]
    ) -> Again:
        """The same without its tensors; ``place``: which address a tensor's is, and how many bytes past it."""
        start, before, encoders = self.below or (self.execute, (*self.known, None, None, None), {})
        flat: list[Any] = [*grid, None, *before]
        pointers: list[tuple[int, int, int]] = []
        descriptors: list[tuple[int, int, int, Callable[[int], Any]]] = []
        make: Callable[[int], Any]
        for i, x in enumerate(args):
            here = len(flat)
            flat.append(x)
            if isinstance(x, Tensor):
                pointers.append((here, *place(x)))
                flat[here] = None  # a recording keeps nobody's memory, nor what was differentiated
            elif isinstance(x, Descriptor):
                if i in encoders:
                    flat += (*x.shape, *x.strides)
                    make = partial(_encoded, encoders[i], x.shape, x.strides)
                else:
                    make = x.at(0).at  # and without its tensor
                descriptors.append((here, *place(x.base), lru_cache(maxsize=1024)(make)))
                flat[here] = None
        flat += self.constants

        def launch(stream: int, addresses: Sequence[int], made: list[Any]) -> None:  # noqa: ARG001
            given = flat.copy()
            given[3] = stream
            for position, index, offset in pointers:
                given[position] = addresses[index] + offset
            for position, index, offset, make in descriptors:
                given[position] = make(addresses[index] + offset)
            start(*given)

        return launch


def _encoded(encoder: Callable[..., tuple[Any, ...]], shape: Any, strides: Any, address: int) -> Any:
    return encoder(address, shape, strides)[0]


def hooked() -> bool:
    """Whether a profiler wants to know of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def is_recorded() -> bool:
    """Whether this thread's launches are taken down."""
    return getattr(_thread, "recorder", None) is not None


@contextmanager
def recorded_by(recorder: Any) -> Iterator[None]:
    """Tell ``recorder.launched`` of each kernel that this thread launches; by None where it must be compiled first."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None


def apart(start: Callable[..., Callable[[], object]], *tensors: Tensor) -> Callable[[], object]:
    """Start what is no kernel, and return what waits for it; of one such thing at a time.

    In a function that is recorded, where tensors are among its allocations.
    """
    recorder = getattr(_thread, "recorder", None)
    return start(*tensors) if recorder is None else recorder.apart(start, tensors)


def _below(execute: Any, function: int, packed: tuple[int, ...], descriptors: list[int]) -> _Below | None:
    """The C function below Triton 3.6's launcher, whose Python takes 7 µs of a forward pass and 15 of a backward.

    None for any other launcher, and for kernels that want scratch memory.
    """
    if not triton.__version__.startswith("3.6.") or type(execute).__name__ != "CudaLauncher":
        return None
    if execute.global_scratch_size or execute.profile_scratch_size:
        return None
    start: Any = execute.launch
    boxes: list[tuple[Any, ...]] = []
    if not isbuiltin(start):  # it encodes descriptors
        within = encoding_launcher(start)
        if within is None:
            return None
        start, boxes = within
    before = (function, execute.launch_cooperative_grid, execute.launch_pdl, None, None, packed, None, None, None)
    return _Below(start, before, dict(zip(descriptors, map(_encoder, boxes), strict=True)))


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
