"""Launching past Triton: a kernel is found by all that it is compiled for, and Triton 3.6 is as it was read."""

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from lightning_attention.kernels.triton import dispatch
from lightning_attention.kernels.triton.recurrent import StateTile, decode_kernel
from lightning_attention.kernels.triton.tiling import TensorView


def _decode(**changes: Any) -> tuple[Any, ...]:
    q = torch.empty(4, 2, 16, dtype=torch.bfloat16)
    given = {
        "qkv": (q, q, q), "out": torch.empty_like(q), "state": torch.empty(8, 2, 16, 16),
        "slots": torch.zeros(4, dtype=torch.int32), "log_decay": torch.zeros(2), "H": 2, "scale": 1.0, **changes,
    }  # fmt: skip
    state = given["state"]
    return (
        *(x for t in given["qkv"] for x in (t, *t.stride()[:2])), given["out"], state, *state.stride(), given["slots"],
        given["log_decay"], given["H"],
        given["scale"],
    )  # fmt: skip


COMPILED_APART = {
    "inputs": {"qkv": (torch.empty(4, 2, 16, dtype=torch.float16),) * 3},
    "one input": {"qkv": (*(torch.empty(4, 2, 16, dtype=torch.bfloat16),) * 2, torch.empty(4, 2, 16))},
    "output": {"out": torch.empty(4, 2, 16)},
    "pool": {"state": torch.empty(8, 2, 16, 16, dtype=torch.bfloat16)},
    "slots": {"slots": torch.zeros(4, dtype=torch.int64)},
    "no slots": {"slots": None},
    "no decay": {"log_decay": None},
}


@pytest.mark.parametrize("name", COMPILED_APART)
def test_no_type_is_forgotten(name: str):
    """Each argument's type tells kernels apart, whether or not somebody thought of it."""
    signature = dispatch.signature_of(decode_kernel, _decode())
    assert signature(_decode(**COMPILED_APART[name])) != signature(_decode())


def test_numbers_do_not_compile():
    signature = dispatch.signature_of(decode_kernel, _decode())
    other = torch.empty(40, 5, 16, dtype=torch.bfloat16)
    assert signature(_decode(qkv=(other,) * 3, state=torch.empty(1, 5, 16, 16), H=5, scale=0.5)) == signature(_decode())


@triton.jit(do_not_specialize=["y"])
def _specialized(x, y, stride, other, BLOCK: tl.constexpr):
    pass


def test_alignment_counts_where_it_is_compiled_for():
    x = torch.empty(64)
    signature = dispatch.signature_of(_specialized, (x, x, 16, 16))
    first = signature((x, x, 16, 16))
    assert signature((x, x[1:], 32, 48)) == first
    for others in ((x[1:], x, 16, 16), (x, x, 17, 16), (x, x, 16, 1)):
        assert signature(others) != first, others
    assert signature((x, x, 17, 16)) != signature((x, x, 1, 16))  # Triton takes 1 for a constant


def test_an_absent_argument_may_come_later():
    signature = dispatch.signature_of(decode_kernel, _decode(slots=None, log_decay=None))
    assert signature(_decode()) != signature(_decode(slots=None))
    assert signature(_decode(slots=torch.zeros(4, dtype=torch.int64))) != signature(_decode())


def test_constants_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch):
    compiled = []

    class Kernel:
        params = decode_kernel.params

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: compiled.append(args[-1]) or SimpleNamespace()

    monkeypatch.setattr(dispatch, "Launch", lambda *_: lambda *_: None)
    monkeypatch.setattr(dispatch, "_launches", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    kernel, tile = Kernel(), StateTile(16, 16, 16, 16, True, False, 1)
    for constants in (tile, tile, tile._replace(aligned=False), tile._replace(columns=32), tile):
        dispatch.run(kernel, (1, 1, 1), _decode(), (constants,), 4, -1)
    assert compiled == [tile, tile._replace(aligned=False), tile._replace(columns=32)]


def _wrapping(**within: Any) -> Any:
    launcher, tensordesc_meta = within.get("launcher"), within.get("tensordesc_meta")
    if "launcher" in within:
        return lambda: (launcher, tensordesc_meta)
    return lambda: tensordesc_meta


def test_an_unknown_launcher_is_named_in_the_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert dispatch.encoding_launcher(_wrapping(tensordesc_meta=[])) is None
    assert "'launcher' is not found" in caplog.text
    assert triton.__version__ in caplog.text


def _launch(below: bool) -> tuple[dispatch.Launch, list[Any]]:
    """A launch with a descriptor as its second argument, and what it hands to the launcher."""
    given: list[Any] = []
    launch = dispatch.Launch.__new__(dispatch.Launch)
    launch.constants, launch.known, launch.compiled = ("tiles",), (7, ("packed",)), None
    launch.execute, launch.below = lambda *args: given.append(args), None
    if below:
        encoders = {1: lambda address, shape, strides: (("encoded", address), *shape, *strides)}
        launch.below = dispatch._Below(launch.execute, (7, "options"), encoders)
    return launch, given


@pytest.mark.parametrize("below", [False, True])
def test_a_launch_is_made_again_over_other_addresses(below: bool):
    launch, given = _launch(below)
    view = TensorView((1, 64, 4, 64), (16384, 256, 64, 1))

    def args(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
        return x, dispatch.Descriptor(y, view, 64, 32), None, 5, 0.5

    x, y, other = torch.empty(4), torch.empty(1, 64, 4, 64, dtype=torch.bfloat16), torch.empty(1, 64, 4, 64)
    places = {id(x): (0, 0), id(y): (1, 8)}
    again = launch.again((3, 2, 1), args(x, y), lambda tensor: places[id(tensor)])
    launch((3, 2, 1), 11, args(other, y))
    again(11, [other.data_ptr(), y.data_ptr() - 8], [])
    slow, fast = (list(map(_plain, call)) for call in given)
    assert slow == fast
    again(12, [1 << 40, (1 << 40) + 256], [])  # the one before is not changed by it
    assert list(map(_plain, given[1])) == slow
    assert _plain(given[2][3]) == 12


def _plain(x: Any) -> Any:
    """An argument of a launcher as it gets to the kernel."""
    if isinstance(x, dispatch.Descriptor):
        return x.base.data_ptr(), x.shape, x.strides, x.block_shape, x.dtype
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="Triton 3.6's launcher")
def test_the_launcher_of_triton_is_the_one_that_was_read():
    """By the names that are read out of it: ``make test-oldest`` has this version."""
    from triton.backends.nvidia import driver

    signature = {0: "tensordesc<bf16[1, 64, 1, 64], NVMMASharedLayout>", 1: "i32"}
    meta = [{"swizzle": 3, "elem_size": 2, "elem_type": 1, "block_size": [64, 64], "fp4_padded": False}]
    calls: list[Any] = []
    wrapped = driver.wrap_handle_tensordesc(lambda *args: calls.append(args), signature, meta)
    found = dispatch.encoding_launcher(wrapped)
    assert found is not None
    start, [box] = found
    start("below")
    assert calls == [("below",)]
    assert box == (3, 2, driver.TMA_DTYPE_DEVICE_TO_HOST[1], [64, 64])


def test_siblings_have_registers_of_their_own(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, int | None]] = []

    class Kernel:
        def warmup(self, x: torch.Tensor, columns: int, *, grid: object, **options: int) -> object:
            asked.append((columns, options.get("maxnreg")))
            return object()

        def __getitem__(self, grid: object) -> object:
            return partial(self.warmup, grid=grid)

    for name, value in (("Launch", lambda *_: None), ("_launches", {}), ("_signatures", {})):
        monkeypatch.setattr(dispatch, name, value)
    dispatch.run(
        Kernel(), (1, 1, 1), (torch.zeros(1),), (16,), 4, -1, lambda: [(16,), (64,)], lambda x: 168 * (x[0] == 64)
    )
    assert asked == [(16, None), (64, 168)]
