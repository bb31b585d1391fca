"""An operation as PyTorch sees it: its ``torch.library`` operator, and the way past it where nobody is watching."""

import inspect
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from lightning_attention.alike import Alike
from lightning_attention.ops import transforms, validation

_library = torch.library.Library("lightning_attention", "DEF")

Run = Callable[..., Any]

_IS_NESTED, _NO = repeat("is_nested"), repeat(False)


def absent(like: Tensor) -> Tensor:
    """What an operator, which must return a fixed number of tensors, returns for None: no elements."""
    return like.new_empty(0)


def _schema(run: Run, writes: Sequence[str], into_out: bool) -> str:
    """The operator's schema, from the annotations; a result that may be None is a tensor there.

    ``into_out``: of the operator that writes its result to ``out``, which is optional in ``run``, and returns nothing.
    """

    def prototype() -> None: ...

    signature = inspect.signature(run)
    parameters = dict(signature.parameters)
    out = parameters.pop("out", None)
    if out is not None:
        required = [out.replace(annotation=Tensor, default=out.empty)] if into_out else []
        signature = signature.replace(parameters=[*parameters.values(), *required])
    if into_out:
        signature = signature.replace(return_annotation=None)
    results = signature.return_annotation
    if get_origin(results) is tuple:
        signature = signature.replace(return_annotation=tuple[(Tensor,) * len(get_args(results))])  # type: ignore[misc]
    prototype.__signature__ = signature  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=writes)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in autocast's dtype where it is on, as for scaled_dot_product_attention; float64 stays.

    Before any check: under autocast q, k and v may come in several dtypes.
    """
    if not torch._C._is_any_autocast_enabled() or not isinstance(tensors[0], Tensor) or tensors[0].is_meta:
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if _is_cast(x) else x for x in tensors)


def _is_cast(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


class Operation:
    """``torch.ops.lightning_attention.NAME``, declared by the function ``_NAME`` that computes it.

    Called, it goes to the function directly where nothing watches, past 30 µs of dispatcher; what was not asked for is
    then None. ``into_out``: NAME_out, which is given ``out``, the function's last argument, and returns nothing.
    """

    def __init__(self, run: Run, fake: Run, writes: Sequence[str] = (), *, into_out: bool = False) -> None:
        self.name = run.__name__.removeprefix("_") + "_out" * into_out
        self._right: Alike[Run] = Alike()
        self._first = next(iter(inspect.signature(run).parameters))
        _library.define(self.name + _schema(run, writes, into_out))
        self.operator = getattr(torch.ops.lightning_attention, self.name).default

        def run_without_autocast(*inputs: Any) -> Any:
            # The facade has cast q, k and v. Autocast is still on in here, where it would round states and decays too.
            if not torch._C._is_any_autocast_enabled():
                return run(*inputs)
            with torch.autocast(inputs[0].device.type, enabled=False):
                return run(*inputs)

        def operator(*inputs: Any) -> Any:
            results = run_without_autocast(*inputs)
            if not isinstance(results, tuple):
                return results
            return tuple(absent(inputs[0]) if x is None else x for x in results)

        self._bare, self.run = run, run_without_autocast
        _library.impl(self.name, operator, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lightning_attention::{self.name}", fake, lib=_library)
        self.register()

    def register(self) -> None:
        """Register what autograd and vmap make of it: nothing."""
        transforms.refuse_vmap(_library, self.name)

    def __call__(self, *inputs: Any) -> Any:
        return self.dispatch(*inputs) if _watched(inputs[0]) else self.run(*inputs)

    def known(self, tensors: tuple[Any, ...]) -> Run | None:
        """What runs the operation, if tensors like these were found right before and nobody watches; or None.

        The checks of tensors ask for nothing that tensors which are alike do not have in common, and nor does the
        operation's way.
        """
        if _modes_watch() or True in map(getattr, tensors, _IS_NESTED, _NO):
            return None
        return self._right.find(tensors)

    def checked(self, tensors: tuple[Any, ...]) -> Run:
        """What runs the operation, of tensors that were found right: this is remembered when they come again."""
        if not _watched(tensors[0]) and self._right.comes_again(tensors):
            # Tensors that are alike are so under autocast, or without it.
            self._right.keep(tensors, self.run if torch._C._is_any_autocast_enabled() else self._bare)
        return self

    def dispatch(self, *inputs: Any) -> Any:
        """The operator itself."""
        if inputs[0].is_nested:
            validation.check_tensor(self._first, inputs[0])
        return self.operator(*inputs)


class Differentiable(Operation):
    """An operation with a derivative by its first arguments, and a rule for vmap.

    ``function`` is called with what computes the operation, its options and its tensors; ``transformed``, with what
    computes it and all of its arguments, where transforms of ``torch.func`` take a function apart.
    """

    def __init__(
        self,
        run: Run,
        fake: Run,
        function: type[torch.autograd.Function],
        transformed: type[torch.autograd.Function],
        heads: transforms.Heads,
    ) -> None:
        self.function, self.transformed, self.heads = function, transformed, heads
        super().__init__(run, fake)

    def register(self) -> None:
        # What torch.library.register_autograd does, less its 80 µs a call of filling in defaults and flattening.
        def below(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.operator(*inputs)

        _library.impl(self.name, lambda *inputs: self._autograd(below, inputs), "Autograd")
        transforms.register_vmap(_library, self.name, self.heads)

    def __call__(self, *inputs: Any) -> Any:
        if not _watched(inputs[0]):
            return self._autograd(self.run, inputs)
        if transforms.active() and not torch.compiler.is_compiling():
            # Here and not below the dispatcher, where a transform can no longer take the function apart.
            return self.transformed.apply(self.operator, *inputs)
        return self.dispatch(*inputs)

    def _autograd(self, run: Run, inputs: tuple[Any, ...]) -> Any:
        count = len(self.heads.inputs)
        if transforms.active():
            transforms.refuse_operator(self.name)
            return self.transformed.apply(run, *inputs)
        if torch.is_grad_enabled():
            for x in inputs[:count]:
                if x is not None and x.requires_grad:
                    return self.function.apply(run, inputs[count:], *inputs[:count])
        return run(*inputs)


def nothing(*inputs: Any) -> None:
    """The fake of an operation that returns nothing."""


def like_v(*inputs: Any) -> Tensor:
    """The fake of an operation on q, k, v and others that returns outputs."""
    return inputs[2].new_empty(inputs[2].shape)


def _watched(x: Tensor) -> bool:
    """Whether a compiler, a mode, a transform or a tensor subclass wants to see the operator itself."""
    return (
        _modes_watch()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or torch._C._get_tracing_state() is not None
        or transforms.active()
    )


def _modes_watch() -> bool:
    """Whether somebody does whom ``Alike`` does not notice."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or transforms.forward_ad._current_level >= 0
    )
