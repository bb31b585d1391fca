"""Calls whose tensors are like those of an earlier one are not checked again, and wrong ones are wrong as before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_attention as la
from lightning_attention.alike import Alike
from lightning_attention.ops import decode, prefill, speculative, validation

N, T, H, D, R = 2, 6, 2, 4, 3
OPERATIONS = (
    decode.decode, decode.decode_out, prefill.prefill, prefill.prefill_out, speculative.verify, speculative.verify_out,
    speculative.commit,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in OPERATIONS:
        monkeypatch.setattr(operation, "_right", Alike())


def given(name: str) -> dict[str, Any]:
    """A right call's arguments."""
    rows = N if name == "decode" else T
    q, k, v = (torch.randn(rows, H, D) for _ in range(3))
    common = {
        "k": k, "v": v, "log_decay": -torch.rand(H), "state": torch.randn(N + 1, H, D, D),
        "slots": torch.arange(N), "recent": la.RecentTokens.empty(N + 1, H, D, D, R, torch.float32),
    }  # fmt: skip
    if name != "decode":
        common["cu_seqlens"] = torch.tensor([0, 2, T])
    if name == "commit":
        return common | {"accepted": torch.zeros(rows, dtype=torch.bool)}
    return common | {"q": q, "out": torch.empty(rows, H, D)}


CALLS: dict[str, Callable[..., Any]] = {
    "decode": la.lightning_attention_decode, "prefill": la.lightning_attention_prefill,
    "verify": la.lightning_attention_verify, "commit": la.lightning_attention_commit,
}  # fmt: skip


def settle(name: str) -> None:
    for _ in range(3):
        CALLS[name](**given(name))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("absent", ["out", "recent", "slots", None])
def test_tensors_are_checked_no_more(name, absent, monkeypatch):
    def call() -> None:
        arguments = given(name)
        if absent is not None:
            arguments.pop(absent, None)
        if absent == "slots":
            arguments["state"] = torch.randn(N, H, D, D)
            arguments["recent"] = la.RecentTokens.empty(N, H, D, D, R, torch.float32)
        CALLS[name](**arguments)

    for _ in range(2):
        call()
    for check in ("check_inputs", "check_kv", "check_pool", "check_no_grad", "check_shape", "check_dtype"):
        monkeypatch.setattr(validation, check, None)
    call()


class Subclass(Tensor):
    pass


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x[1:],
    "dtype": lambda x: x.to(torch.complex64),
    "device": lambda x: x.to("meta"),
    "shape": lambda x: torch.cat([x, x], -1),
    "strides": lambda x: torch.stack([x, x], -1)[..., 0] if x.ndim > 1 else x[None],
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "list": lambda x: x.tolist(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_wrong_is_wrong_after_a_right_call(name, wrong):
    def errors() -> dict[str, tuple[type, str]]:
        found = {}
        for argument, x in given(name).items():
            if argument == "recent":
                changed: Any = la.RecentTokens(WRONG[wrong](x.k), x.v, x.count)
            else:
                changed = WRONG[wrong](x)
            try:
                CALLS[name](**{**given(name), argument: changed})
            except Exception as error:  # whichever it is, it is to be the same
                found[argument] = (type(error), str(error))
        return found

    before = errors()
    right = {"strides": {"log_decay", "slots", "cu_seqlens", "accepted", "state"}}.get(wrong, set())
    assert before.keys() | right >= given(name).keys() - {"recent"}
    settle(name)
    assert errors() == before


@pytest.mark.parametrize("name", ["decode", "prefill", "verify"])
def test_numbers_are_looked_at_in_every_call(name):
    settle(name)
    for argument, wrong, message in (
        ("log_decay", torch.ones(H), r"log_decay\[0\] is 1.0"),
        ("slots", torch.ones(N, dtype=torch.int64), "a slot must not be given twice"),
        ("scale", torch.inf, "scale is inf"),
        ("scale", torch.ones(()), "scale is a Tensor"),
        ("recent", "ring", "recent is a str"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            CALLS[name](**{**given(name), argument: wrong})


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_is_refused_once_there_may_be_one(name):
    arguments = given(name)
    for argument in ("v", "state"):
        arguments[argument].requires_grad_()
    with torch.no_grad():
        for _ in range(3):
            CALLS[name](**arguments)
    with pytest.raises(ValueError, match="v requires grad"):
        CALLS[name](**arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused(name):
    settle(name)
    with forward_ad.dual_level():
        arguments = given(name)
        arguments["v"] = forward_ad.make_dual(arguments["v"], torch.ones_like(arguments["v"]))
        with pytest.raises(ValueError, match="v has a tangent"):
            CALLS[name](**arguments)


@pytest.mark.parametrize("name", CALLS)
def test_whoever_watches_sees_the_operator(name):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    settle(name)
    seen: list[str] = []
    arguments = given(name)
    with Watch():
        CALLS[name](**arguments)
    assert any(x.startswith(f"lightning_attention.{name}") for x in seen)


def call_without_out(name: str, arguments: dict[str, Any]) -> Tensor:
    arguments.pop("out")
    out: Tensor = CALLS[name](**arguments)
    return out


@pytest.mark.parametrize("name", ["decode", "prefill", "verify"])
def test_fake_tensors_compilers_and_transforms_find_no_short_cut(name):
    for _ in range(3):
        call_without_out(name, given(name))
    arguments = given(name)
    mode = FakeTensorMode()
    with mode:
        fake = {key: mode.from_tensor(x) for key, x in arguments.items() if isinstance(x, Tensor)}
        assert isinstance(call_without_out(name, fake), FakeTensor)
    mixed = given(name)
    with FakeTensorMode(allow_non_fake_inputs=True):  # over tensors that are none
        assert isinstance(call_without_out(name, mixed), FakeTensor)
    compiled = torch.compile(lambda arguments: call_without_out(name, arguments), backend="eager", fullgraph=True)
    one, other = given(name), given(name)
    for key, x in one.items():
        if isinstance(x, Tensor):
            other[key] = x.clone()
    assert torch.equal(compiled(one), call_without_out(name, other))
    batch = torch.stack([mixed["v"]] * 2)
    with pytest.raises(NotImplementedError, match="no vmap"):
        torch.vmap(lambda v: call_without_out(name, {"out": None, **mixed, "v": v}))(batch)


def test_autocast_casts_as_before():
    settle("decode")
    for _ in range(3):
        arguments = given("decode")
        del arguments["out"]
        with torch.autocast("cpu"):
            assert la.lightning_attention_decode(**arguments).dtype == torch.bfloat16
