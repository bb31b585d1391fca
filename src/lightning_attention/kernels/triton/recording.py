"""What follows from the shapes of a call is found out once: launches are recorded, and made again over other tensors.

Nothing on the host depends on the numbers in a tensor. Two calls whose tensors are alike (shape, strides, dtype,
alignment) and whose other arguments are equal therefore allocate the same and launch the same kernels with the same
arguments but for the addresses. docs/performance.md has what that saves. A collective among them is ``dispatch.apart``.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attention.kernels.triton import dispatch

MOST = 1024  # recordings of a function: of so many shapes

_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
)

#: size, stride, dtype -> a tensor on the current device: what compiled models allocate with. Past the dispatcher, which
#: takes three times as long.
_empty_strided: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def _is_current(device: int) -> bool:
    return device >= 0 and device == torch._C._cuda_getDevice()  # the interpreter has tensors on the CPU, -1


class _Allocation(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: int) -> Tensor:
        if _empty_strided is None:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=torch.device("cuda", device))
        return _empty_strided(*self)


class _Recorder(TorchDispatchMode):
    """Takes down what is allocated and launched while a function runs.

    complete: whether that is all it does; compiles: whether a kernel had to be compiled, so that one should look again.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.count, self.tensors = len(inputs), [*inputs]  # and what is allocated
        self.launches: list[dispatch.Again] = []
        self.complete, self.compiles = True, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.tensors.append(found)
        elif not func.is_view:
            self.complete = False  # a kernel of PyTorch's
        return found

    def launched(self, launch: dispatch.Launch | None, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        """Take down a launch; None of a kernel that is yet to be compiled."""
        if launch is None:
            self.compiles = True
            return
        try:
            self.launches.append(launch.again(grid, args, self._place))
        except LookupError:
            self.complete = False

    def apart(self, start: Callable[..., Callable[[], object]], tensors: Sequence[Tensor]) -> Callable[[], object]:
        """Take down that something is started, and that it is waited for; what it calls of PyTorch is its own."""
        places = [i - self.count for x in tensors for i, y in enumerate(self.tensors) if _layout(x) == _layout(y)]
        self.complete &= len(places) == len(tensors) and min(places) >= 0
        with torch._C._DisableTorchDispatch():
            wait = start(*tensors)

        def start_again(stream: int, addresses: Sequence[int], made: list[Any]) -> None:  # noqa: ARG001
            made.append(start(*[made[i] for i in places]))

        def wait_again(stream: int, addresses: Sequence[int], made: list[Any]) -> None:  # noqa: ARG001
            made.pop()()

        def waited() -> None:
            self.launches.append(wait_again)
            with torch._C._DisableTorchDispatch():
                wait()

        self.launches.append(start_again)
        return waited

    def _place(self, x: Tensor) -> tuple[int, int]:
        """Which of the inputs and allocations x lies in, and how many bytes past its beginning.

        By storage, because PyTorch hands out other tensors than a mode returns. Inputs that share one are told apart by
        where they begin, and parts of them not at all.
        """
        storage = x.untyped_storage()._cdata
        found = [i for i, y in enumerate(self.tensors) if y.untyped_storage()._cdata == storage]
        if len(found) > 1:
            found = [i for i in found if self.tensors[i].data_ptr() == x.data_ptr()]
        if len(found) != 1:
            raise LookupError
        return found[0], x.data_ptr() - self.tensors[found[0]].data_ptr()

    def recording(self, device: int, results: Any) -> "_Recording | None":
        """What can be made again, if that is all."""
        several = isinstance(results, tuple)
        kept: list[int | None] = []
        for x in results if several else (results,):
            alike = [i for i, y in enumerate(self.tensors) if x is not None and _layout(x) == _layout(y)]
            self.complete &= x is None or (len(alike) == 1 and alike[0] >= self.count)
            kept.append(alike[0] - self.count if alike else None)
        if not self.complete:
            return None
        made = [_Allocation(tuple(x.shape), x.stride(), x.dtype) for x in self.tensors[self.count :]]
        return _Recording(device, made, self.launches, kept, several)


def _layout(x: Tensor) -> tuple[Any, ...]:
    """Two tensors that have it in common are the same numbers."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype


class _Recording(NamedTuple):
    """Launches and allocations of a call; ``kept``: which of these it returns, ``several``: in a tuple."""

    device: int
    made: list[_Allocation]
    launches: list[dispatch.Again]
    kept: list[int | None]
    several: bool

    def __call__(self, addresses: list[int]) -> Any:
        made: list[Any] = [x.make(self.device) for x in self.made]
        addresses += [x.data_ptr() for x in made]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for launch in self.launches:
            launch(stream, addresses, made)
        if not self.several:
            return None if self.kept[0] is None else made[self.kept[0]]
        return tuple([None if i is None else made[i] for i in self.kept])


Result = TypeVar("Result")


def recorded(run: Callable[..., Result]) -> Callable[..., Result]:
    """For a function whose allocations and launches depend on the shapes of its tensors, and not on their numbers.

    It is run on the device of its first argument. The second call of a shape is recorded, and the third is made from
    that: a shape that never comes again is not.
    """
    recordings: dict[tuple[Any, ...], _Recording | None] = {}
    seen: set[tuple[Any, ...]] = set()
    unknown = object()
    parameters = list(signature(run).parameters.values())
    tensors = [i for i, x in enumerate(parameters) if x.annotation in (Tensor, Tensor | None)]
    defaults = [x.default for x in parameters]
    options = [i for i in range(len(parameters)) if i not in tensors]
    on_its_device = dispatch.on_its_device(run)

    @wraps(run)
    def launched(*args: Any) -> Any:
        device = args[0].get_device()
        if not _is_current(device):
            return on_its_device(*args)
        if len(args) < len(defaults):
            args += tuple(defaults[len(args) :])
        key: list[Any] = [args[i] for i in options]
        key += device, args[0].dtype is torch.float32 and torch.get_float32_matmul_precision()
        addresses = []
        for i in tensors:
            x = args[i]
            if x is None:
                key.append(None)
            else:
                address = x.data_ptr()
                addresses.append(address)
                key += x.shape, x.stride(), x.dtype, address & 15
        call = tuple(key)
        recording = recordings.get(call, unknown)
        if recording is unknown:
            return record(call, device, addresses, args)
        if recording is None or dispatch.hooked():
            return run(*args)
        dispatch.ensure_context(device)
        return recording(addresses)  # type: ignore[operator]

    def record(call: tuple[Any, ...], device: int, addresses: list[int], args: tuple[Any, ...]) -> Any:
        # Of two inputs in one place nobody could say which of them a kernel is given.
        if call not in seen or len(set(addresses)) < len(addresses):
            if len(seen) >= MOST:
                seen.clear()
            seen.add(call)
            return run(*args)
        dispatch.ensure_context(device)
        recorder = _Recorder([args[i] for i in tensors if args[i] is not None])
        with dispatch.recorded_by(recorder), recorder:
            results = run(*args)
        if not recorder.compiles:
            if len(recordings) >= MOST:
                recordings.clear()
            recordings[call] = recorder.recording(device, results)
        return results

    return launched
