"""Which tensors are alike, by PyTorch's own comparison and by the one in Python."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention import alike
from lightning_attention.alike import Alike


@pytest.fixture(params=["in C", "in Python"], autouse=True)
def _comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in Python":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")


def tensors() -> list[Any]:
    return [torch.ones(3, 4), None, torch.ones(3, 4)]


@pytest.fixture
def memory() -> Alike[str]:
    found: Alike[str] = Alike()
    found.keep(tensors(), "this")
    return found


def test_numbers_and_places_tell_no_tensors_apart(memory):
    assert memory.find(tensors()) == "this"
    assert memory.find([torch.full((3, 4), torch.nan), None, torch.ones(2, 3, 4)[1]]) == "this"


class Subclass(Tensor):
    pass


ANOTHER: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.view(4, 3),
    "more": lambda x: x.repeat(2, 1),
    "strides": lambda x: x.T.contiguous().T,
    "dtype": lambda x: x.int(),
    "device": lambda x: x.to("meta"),
    "gradient": lambda x: x.requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "subclass": lambda x: x.as_subclass(Subclass),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "negative": torch._neg_view,
    "array": lambda x: x.numpy(),
    "number": lambda x: 1.0,
    "nothing": lambda x: None,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("other", ANOTHER)
def test_all_else_does(memory, other, place, is_last):
    given = tensors()
    if is_last:  # what was found last is looked at before any sizes are
        assert memory.find(tensors()) == "this"
    given[place] = ANOTHER[other](given[place])
    assert memory.find(given) is None


def test_where_nothing_was_a_tensor_is_none(memory):
    x, _, y = tensors()
    assert memory.find([x, y, None]) is None
    assert memory.find([x, torch.ones(3, 4), y]) is None


def test_a_tensor_that_is_given_twice_is_like_none(memory):
    x = torch.ones(3, 4)
    assert memory.find([x, None, x]) is None
    memory.keep([x, x], "twice")
    assert memory.find([x, x]) is None
    assert memory.find([x, torch.ones(3, 4)]) is None


def test_whether_gradients_are_computed_tells_calls_apart(memory):
    given = [torch.ones(3, 4, requires_grad=True), None, torch.ones(3, 4)]
    with torch.no_grad():
        memory.keep(given, "no gradients")
        assert memory.find(given) == "no gradients"
    assert memory.find(given) is None


LAYERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "below autograd": torch._C._AutoDispatchBelowAutograd,
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_pytorch_tell_calls_apart(memory, layer):
    given = tensors()
    with LAYERS[layer]():
        assert memory.find(given) is None
        memory.keep(given, "in it")
        assert memory.find(given) == "in it"
    assert memory.find(given) == "this"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "through",
    [torch.func.grad, torch.vmap, torch.func.functionalize, lambda f: partial(torch.jit.trace, f, check_trace=False)],
)
def test_transforms_tell_calls_apart(memory, through):
    found = []

    def f(x: Tensor) -> Tensor:
        found.append(memory.find(tensors()))
        return (x * x).sum()

    through(f)(torch.ones(2))
    assert found
    assert set(found) == {None}


def test_keys_tell_calls_apart(memory):
    memory.keep(tensors(), "that", key=(1.0, False))
    assert memory.find(tensors(), (1.0, False)) == "that"
    assert memory.find(tensors(), (2.0, False)) is None
    assert memory.find(tensors()) == "this"


def test_what_comes_again_was_there_before(memory):
    assert [memory.comes_again(tensors()) for _ in range(3)] == [False, True, True]
    assert not memory.comes_again(tensors(), key=1)
    assert not memory.comes_again([torch.ones(5, 4), None, torch.ones(3, 4)])


def test_so_many_are_kept_and_no_more(memory, monkeypatch):
    monkeypatch.setattr(alike, "MOST", 2)
    for n in (5, 6):
        memory.keep([torch.ones(n)], str(n))
    assert memory.find(tensors()) is None
    assert memory.find([torch.zeros(6)]) == "6"
