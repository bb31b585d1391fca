"""Calls that are made again from a recording: over which tensors, and when not; ../gpu has the numbers."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention import alike
from lightning_attention.kernels.triton import dispatch, recording

RUNS: list[str] = []  # the calls that were not made from a recording
LAUNCHED: list[tuple[Any, ...]] = []  # what kernels were given, from the kernel's name on


class Kernel:
    """A kernel that Triton compiles at its first call."""

    params = ()

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: SimpleNamespace(
            run=lambda *args: LAUNCHED.append(args), function="function", packed_metadata=()
        )


KERNEL, OTHER_KERNEL = Kernel(), Kernel()


@pytest.fixture(autouse=True)
def a_device(monkeypatch: pytest.MonkeyPatch):
    """The CPU passes for the current GPU, on which nothing is compiled yet."""
    RUNS.clear(), LAUNCHED.clear()
    monkeypatch.setattr(dispatch, "_launches", {})
    monkeypatch.setattr(recording, "_is_current", lambda device: device == -1)
    monkeypatch.setattr(
        recording, "_empty_strided", lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    )
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: "stream", raising=False)


def operation(q: Tensor, k: Tensor, rate: Tensor | None, scale: float, wants: bool) -> tuple[Tensor, Tensor | None]:
    """One that allocates two results and a buffer in two parts."""
    RUNS.append("operation")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    final = torch.empty(3, dtype=torch.float32) if wants else None
    first, second = torch.empty(2, 5, dtype=torch.float32).unbind()
    dispatch.run(KERNEL, (q.shape[0], 1, 1), (q, k, rate, first, scale), ("tiles",), 4, -1)
    dispatch.run(KERNEL, (1, 1, 1), (second, out, rate, final, q.shape[0]), ("other",), 4, -1)
    return out, final


@pytest.fixture
def call() -> Callable[..., Any]:
    return recording.recorded(operation)


def tensors(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(shape, **options), torch.empty(shape, **options)


def settle(call: Callable[..., Any], *args: Any) -> None:
    """Calls until nothing is compiled any more and the call is recorded."""
    for _ in range(3):
        call(*args)
    RUNS.clear(), LAUNCHED.clear()


def test_a_recorded_function_may_be_part_of_another(call):
    @recording.recorded
    def whole(q: Tensor, k: Tensor, rate: Tensor | None, scale: float, wants: bool) -> tuple[Tensor, Tensor | None]:
        RUNS.append("whole")
        call(k, q, rate, scale, wants)
        return call(q, k, rate, scale, wants)

    args = (*tensors(4, 2), torch.empty(1), 1.0, True)
    settle(call, *args)  # even if the part is known by itself
    settle(whole, *args)
    whole(*args)
    assert not RUNS
    assert len(LAUNCHED) == 4


def test_a_recording_keeps_no_tensor(call):
    """Kept inputs would be memory that nobody can free, and keep the graph that leads to them."""
    (q, k), rate = tensors(4, 2), torch.empty(1)
    alive: list[weakref.ref[Tensor]] = []
    for _ in range(3):
        out, final = call(q, k, rate, 1.0, True)
        alive += [weakref.ref(x) for x in (out, final)]
    alive += [weakref.ref(x) for x in (q, k, rate)]
    LAUNCHED.clear()
    del q, k, rate, out, final
    gc.collect()
    assert [x() for x in alive] == [None] * len(alive)
    call(*tensors(4, 2), torch.empty(1), 1.0, True)
    assert len(RUNS) == 2  # the fourth call was made from the recording, as the third was


def test_a_call_is_made_again_over_its_own_tensors(call):
    settle(call, *tensors(4, 2), torch.empty(1), 1.0, True)
    (q, k), rate = tensors(4, 2), torch.empty(1)
    out, final = call(q, k, rate, 1.0, True)
    assert RUNS == []
    assert (out.shape, out.stride(), out.dtype, final.shape) == (q.shape, (2, 1), q.dtype, (3,))
    one, two = ([x for x in args if x is not None] for args in LAUNCHED)
    assert one[:6] == [4, 1, 1, "stream", "function", ()]
    first, second = one[8 + 1], two[6]
    assert one[6:] == [q.data_ptr(), k.data_ptr(), rate.data_ptr(), first, 1.0, "tiles"]
    assert two[6:] == [second, out.data_ptr(), rate.data_ptr(), final.data_ptr(), 4, "other"]
    assert second - first == 20  # the parts of one allocation
    again, _ = call(q, k, rate, 1.0, True)
    assert again.data_ptr() != out.data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        (*tensors(8, 2), torch.empty(1), 1.0, True),
        (*tensors(4, 2, dtype=torch.bfloat16), torch.empty(1), 1.0, True),
        (torch.empty(2, 4).T, torch.empty(4, 2), torch.empty(1), 1.0, True),
        (torch.empty(9)[1:].view(4, 2), torch.empty(4, 2), torch.empty(1), 1.0, True),
        (*tensors(4, 2), None, 1.0, True),
        (*tensors(4, 2), torch.empty(1), 0.5, True),
        (*tensors(4, 2), torch.empty(1), 1.0, False),
    ],
    ids=["shape", "dtype", "strides", "alignment", "absent", "option", "flag"],
)
def test_only_of_the_same_is_one_made(call, other):
    settle(call, *tensors(4, 2), torch.empty(1), 1.0, True)
    out, final = call(*other)
    assert RUNS == ["operation"]
    assert out.shape == other[0].shape
    assert (final is None) == (not other[4])


def test_the_precision_of_float32_products_tells_calls_apart(call, monkeypatch):
    settle(call, *tensors(4, 2), None, 1.0, False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    call(*tensors(4, 2), None, 1.0, False)
    assert RUNS == ["operation"]


def test_shapes_that_come_once_are_not_recorded(call, monkeypatch):
    settle(call, *tensors(4, 2), None, 1.0, False)
    monkeypatch.setattr(recording, "_Recorder", None)
    for T in (5, 6, 7):
        call(*tensors(T, 2), None, 1.0, False)
    assert RUNS == ["operation"] * 3


def test_inputs_in_one_place_are_not_recorded_but_may_come_later(call):
    q, k = tensors(4, 2)
    for _ in range(5):
        call(q, q, None, 1.0, False)
    assert len(RUNS) == 5
    settle(call, q, k, None, 1.0, False)
    call(q, q.view_as(q), None, 1.0, False)
    assert RUNS == []
    call(q, k, None, 1.0, False)
    assert [args[9:11] for args in LAUNCHED[::2]] == [(q.data_ptr(), q.data_ptr()), (q.data_ptr(), k.data_ptr())]
    call(q, q, None, 1.0, False)
    assert RUNS == ["operation"]


def test_parts_of_inputs_keep_their_place():
    def halves(q: Tensor, k: Tensor) -> Tensor:
        RUNS.append("halves")
        out = torch.empty_like(q)
        dispatch.run(OTHER_KERNEL, (1, 1, 1), (q[2:], k[:, 1:], out[1:]), (), 4, -1)
        return out

    call = recording.recorded(halves)
    settle(call, *tensors(4, 2))
    q, k = tensors(4, 2)
    out = call(q, k)
    assert LAUNCHED[0][9:] == (q.data_ptr() + 16, k.data_ptr() + 4, out.data_ptr() + 8)
    call = recording.recorded(halves)
    for _ in range(4):
        call(*torch.empty(4, 4).split(2, 1))  # a part of which: of q, or of k?
    assert len(RUNS) == 4


def test_inputs_may_share_a_storage(call):
    settle(call, *torch.empty(4, 4).split(2, 1), None, 1.0, False)
    both = torch.empty(4, 4)
    call(*both.split(2, 1), None, 1.0, False)
    assert LAUNCHED[0][9:11] == (both.data_ptr(), both.data_ptr() + 8)


def test_what_pytorch_computes_itself_is_not_recorded():
    def zeroed(q: Tensor) -> Tensor:
        RUNS.append("zeroed")
        return torch.empty_like(q).zero_()

    def its_input(q: Tensor) -> Tensor:
        RUNS.append("its input")
        return q

    def part(q: Tensor) -> Tensor:
        RUNS.append("part")
        return torch.empty(2, *q.shape)[0]

    for run in (zeroed, its_input, part):
        call, q = recording.recorded(run), torch.ones(3)
        for _ in range(5):
            assert call(q).shape == (3,)
    assert RUNS == ["zeroed"] * 5 + ["its input"] * 5 + ["part"] * 5


def test_what_is_no_kernel_is_started_and_waited_for_again():
    """Over what the call allocated, in its place among the launches; what PyTorch computes in it is its own."""

    def start(source: Tensor, target: Tensor) -> Callable[[], None]:
        LAUNCHED.append(("start", source.data_ptr(), target.data_ptr()))
        target.copy_(torch.ones(6))

        def wait() -> None:
            target.add_(1)
            LAUNCHED.append(("wait",))

        return wait

    kernel = Kernel()

    def gathers(q: Tensor) -> Tensor:
        RUNS.append("gathers")
        source, out = torch.empty(3), torch.empty(6)
        dispatch.run(kernel, (1, 1, 1), (q, source), (), 4, -1)
        wait = dispatch.apart(start, source, out)
        dispatch.run(kernel, (2, 1, 1), (q, source), (), 4, -1)
        wait()
        return out

    call = recording.recorded(gathers)
    settle(call, torch.empty(2))
    for _ in range(2):
        LAUNCHED.clear()
        q = torch.empty(2)
        out = call(q)
        assert RUNS == []
        assert torch.equal(out, torch.full((6,), 2.0))
        (*_, source), started, (blocks, *_), waited = LAUNCHED
        assert (started, blocks, waited) == (("start", source, out.data_ptr()), 2, ("wait",))

    def of_an_input(q: Tensor) -> Tensor:
        RUNS.append("of an input")
        out = torch.empty(6)
        dispatch.apart(start, q, out)()
        return out

    call = recording.recorded(of_an_input)
    for _ in range(4):
        call(torch.empty(2))
    assert len(RUNS) == 4


def test_an_error_leaves_nothing_behind():
    def fails(q: Tensor) -> Tensor:
        RUNS.append("fails")
        if len(RUNS) == 2:
            raise ValueError("the second time")
        return torch.empty_like(q)

    call = recording.recorded(fails)
    call(torch.ones(3))
    with pytest.raises(ValueError, match="the second time"):
        call(torch.ones(3))
    assert dispatch._thread.recorder is None
    assert all(call(torch.ones(3)).shape == (3,) for _ in range(3))
    assert len(RUNS) == 3


def test_a_profiler_sees_every_launch(call, monkeypatch):
    settle(call, *tensors(4, 2), None, 1.0, False)
    monkeypatch.setattr(dispatch, "hooked", lambda: True)
    monkeypatch.setattr(dispatch.Launch, "__call__", lambda *_: None)
    call(*tensors(4, 2), None, 1.0, False)
    assert RUNS == ["operation"]


def test_so_many_shapes_are_kept_and_no_more(call, monkeypatch):
    monkeypatch.setattr(alike, "MOST", 2)
    for T in (4, 5, 6):
        settle(call, *tensors(T, 2), None, 1.0, False)
    call(*tensors(6, 2), None, 1.0, False)
    assert RUNS == []
    call(*tensors(4, 2), None, 1.0, False)
    assert RUNS == ["operation"]
