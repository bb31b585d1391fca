"""What follows from the shapes of a call is found out once: launches are recorded, and made again over other tensors.

Nothing on the host depends on the numbers in a tensor. Two calls whose tensors are alike (shape, strides, dtype,
alignment) and whose other arguments are equal therefore allocate the same and launch the same kernels with the same
arguments but for the addresses. docs/performance.md has what that saves. A collective among them is ``dispatch.apart``.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce, wraps
from inspect import signature
from operator import itemgetter, or_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attention.alike import Alike
from lightning_attention.kernels.triton import dispatch

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


def _maker(x: Tensor, device: int) -> Callable[[], Tensor]:
    """Allocates another like x."""
    if _empty_strided is not None:
        return partial(_empty_strided, tuple(x.shape), x.stride(), x.dtype)
    return partial(torch.empty_strided, x.shape, x.stride(), dtype=x.dtype, device=torch.device("cuda", device))


#: A call made again: its allocations and launches, over inputs at these addresses.
Recording = Callable[[list[int]], Any]


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

    def recording(self, device: int, results: Any) -> Recording | None:
        """What can be made again, if that is all."""
        several = isinstance(results, tuple)
        kept: list[int | None] = []
        for x in results if several else (results,):
            alike = [i for i, y in enumerate(self.tensors) if x is not None and _layout(x) == _layout(y)]
            self.complete &= x is None or (len(alike) == 1 and alike[0] >= self.count)
            kept.append(alike[0] - self.count if alike else None)
        if not self.complete:
            return None
        makers = [_maker(x, device) for x in self.tensors[self.count :]]
        launches, only = self.launches, kept[0]

        def again(addresses: list[int]) -> Any:
            made: list[Any] = [make() for make in makers]
            addresses += [x.data_ptr() for x in made]
            stream = torch._C._cuda_getCurrentRawStream(device)
            for launch in launches:
                launch(stream, addresses, made)
            if several:
                return tuple([None if i is None else made[i] for i in kept])
            return None if only is None else made[only]

        return again


def _layout(x: Tensor) -> tuple[Any, ...]:
    """A key by which two tensors are the same numbers in memory."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype


Result = TypeVar("Result")


def _taken(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that picks these places of its arguments, in C where there are several."""
    return itemgetter(*places) if len(places) > 1 else lambda args: tuple([args[i] for i in places])


def recorded(run: Callable[..., Result]) -> Callable[..., Result]:
    """Record a function whose allocations and launches depend on the shapes of its tensors, and not on their numbers.

    It is run on the device of its first argument. The second call of a shape is recorded, and the third is made from
    that: a shape that never comes again is not.
    """
    recordings: Alike[Callable[..., Any]] = Alike()
    parameters = list(signature(run).parameters.values())
    places = [i for i, x in enumerate(parameters) if x.annotation in (Tensor, Tensor | None)]
    tensors_of, options_of = _taken(places), _taken([i for i in range(len(parameters)) if i not in places])
    defaults = tuple(x.default for x in parameters)
    on_its_device = dispatch.on_its_device(run)

    @wraps(run)
    def launched(*args: Any) -> Any:
        device = args[0].get_device()
        if not _is_current(device):
            return on_its_device(*args)
        if dispatch.is_recorded():  # as part of another function
            return run(*args)
        args += defaults[len(args) :]
        tensors = tensors_of(args)
        addresses = [x.data_ptr() for x in tensors if x is not None]
        # Whether numbers can be read 16 bytes at a time: nearly always all can.
        alignment = reduce(or_, addresses) & 15 and tuple([x & 15 for x in addresses])
        precision = args[0].dtype is torch.float32 and torch.get_float32_matmul_precision()
        key = *options_of(args), alignment, precision
        recording = recordings.find(tensors, key)
        if recording is None:
            return record(device, tensors, key, addresses, args)
        if recording is run or dispatch.hooked():
            return run(*args)
        dispatch.ensure_context(device)
        return recording(addresses)

    def record(
        device: int, tensors: tuple[Tensor | None, ...], key: tuple[Any, ...], addresses: list[int],
        args: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        # Where two inputs lie in one place, nobody could say which of them a kernel is given.
        if not recordings.comes_again(tensors, key) or len(set(addresses)) < len(addresses):
            return run(*args)
        dispatch.ensure_context(device)
        recorder = _Recorder([x for x in tensors if x is not None])
        with dispatch.recorded_by(recorder), recorder:
            results = run(*args)
        if not recorder.compiles:
            recordings.keep(tensors, recorder.recording(device, results) or run, key)
        return results

    return launched
