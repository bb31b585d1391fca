"""Pools of states in 8 bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_attention.ops import backends, validation
from lightning_attention.ops.operation import Operation, nothing
from lightning_attention.ops.recent import RecentTokens


@dataclass(frozen=True, eq=False)
class QuantizedStates:
    """A pool of states in two planes of 8 bits, of which a decoding step reads one.

    Given as ``state`` to the serving operations; all but prefill want ``recent`` with it, and verify leaves no
    ``snapshots`` of it. A state S is scale · (high + low / 254), a column e of it having one scale, so that its largest
    number is 127 in ``high``. Steps read scale · high, which has a relative error of 6e-3 (docs/numerics.md); S, which
    a fold or a prefill starts from, has one 254 times smaller, and so the errors of steps do not add up. A column with
    a NaN or an infinity in it is NaN all over when it is read. The least scale is 2^-100: numbers below 1.6e-33 are
    read as 0.

    A row of all three tensors is a sequence's state, with its row of ``recent``: copy them to any slot, or have
    ``dequantize`` make floats of them and ``quantize`` make them of floats.

    Attributes:
        high: [S, H, D, E] int8, from -127 to 127, each [D, E] contiguous.
        low: [S, H, D, E] int8, from -127 to 127, with high's strides.
        scale: [S, H, E] float32, the last stride 1.
    """

    high: Tensor
    low: Tensor
    scale: Tensor

    @classmethod
    def empty(
        cls, slots: int, num_heads: int, D: int, E: int, device: torch.device | str | int | None = None
    ) -> "QuantizedStates":
        """A pool [slots, num_heads, D, E] of zeros, H being that of v."""
        high, low = (torch.zeros(slots, num_heads, D, E, dtype=torch.int8, device=device) for _ in range(2))
        return cls(high, low, torch.zeros(slots, num_heads, E, device=device))

    def dequantize(self, slots: Tensor | None = None) -> Tensor:
        """Rows as float32, by both planes.

        Nothing is read on the host. What a ring holds is not in them: ``lightning_attention_fold`` puts it there.

        Args:
            slots: [N] int32 or int64; negative: padding, and zero. None: all rows, N = S.

        Returns:
            [N, H, D, E] float32, a new tensor.

        Raises:
            TypeError: an attribute or ``slots`` is not a tensor, or has another dtype than the above.
            ValueError: a shape, stride or device does not fit; on the CPU also a slot past the pool or given twice.
        """
        _check(self)
        validation.check_slots(slots, self.high)
        return dequantize(self.high, self.low, self.scale, slots, backends.choose(None, self.high.device))

    def quantize(self, states: Tensor, slots: Tensor | None = None) -> None:
        """Write rows, in place, each number to the nearest that the two planes have.

        Nothing is read on the host. Rings are not known here: what one holds belongs to the state that was there
        before, and is dropped by setting its ``count`` to 0.

        Args:
            states: [N, H, D, E] float32; any strides.
            slots: [N] int32 or int64; negative: the row is not written anywhere. None: all rows, N = S.

        Raises:
            TypeError: an attribute or argument is not a tensor, or has another dtype than the above.
            ValueError: a shape, stride or device does not fit, or ``states`` requires grad; on the CPU also a slot past
                the pool or given twice.
        """
        _check(self)
        validation.check_slots(slots, self.high)
        validation.check_tensor("states", states)
        N = self.high.shape[0] if slots is None else slots.shape[0]
        validation.check_shape("states", states, (N, *self.high.shape[1:]), "[N, H, D, E]")
        validation.check_dtype("states", states, (torch.float32,))
        validation.check_device("states", states, self.high)
        validation.check_no_grad(states=states)
        quantize(states, self.high, self.low, self.scale, slots, backends.choose(None, self.high.device))


def planes(state: Tensor | QuantizedStates) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A pool as the operators take it; one in 8 bits is checked by itself."""
    if isinstance(state, QuantizedStates):
        _check(state)
        return state.high, state.low, state.scale
    return state, None, None


def check_has_rings(state: Tensor | QuantizedStates, recent: RecentTokens | None) -> None:
    """Refuse 8-bit states without rings, for operations other than prefill."""
    if recent is None and isinstance(state, QuantizedStates):
        raise ValueError(
            "recent is None; with QuantizedStates it must be RecentTokens: only prefill takes these states alone"
        )


def _check(states: QuantizedStates) -> None:
    high, low, scale = states.high, states.low, states.scale
    if _is_right(high, low, scale):
        return
    validation.check_tensor("state.high", high)
    if high.ndim != 4:
        raise ValueError(f"state.high has shape {list(high.shape)}; it must be [S, H, D, E]")
    S, H, D, E = high.shape
    for name, x, wanted, meaning, dtype in (
        ("state.high", high, (S, H, D, E), "[S, H, D, E]", torch.int8),
        ("state.low", low, (S, H, D, E), "[S, H, D, E]", torch.int8),
        ("state.scale", scale, (S, H, E), "[S, H, E]", torch.float32),
    ):
        validation.check_tensor(name, x)
        validation.check_shape(name, x, wanted, meaning)
        validation.check_dtype(name, x, (dtype,))
        validation.check_device(name, x, high)
        if not x[:1, :1].is_contiguous() or (0 in x.stride() and x.numel() > 1):
            raise ValueError(f"{name} has strides {list(x.stride())}; all but S and H must be contiguous")
    if high.stride() != low.stride():
        raise ValueError(
            f"state.low has strides {list(low.stride())}; it must have state.high's, {list(high.stride())}"
        )
    validation.check_no_grad(**{"state.scale": scale})


def _is_right(high: Tensor, low: Tensor, scale: Tensor) -> bool:
    """Most of what is right, in one look."""
    if not (type(high) is type(low) is type(scale) is Tensor and high.layout is low.layout is scale.layout):
        return False
    shape = high.shape
    return (
        len(shape) == 4
        and high.layout is torch.strided
        and low.shape == shape
        and scale.shape == (shape[0], shape[1], shape[3])
        and high.dtype is low.dtype is torch.int8
        and scale.dtype is torch.float32
        and high.device == low.device == scale.device
        and high.is_contiguous()
        and low.is_contiguous()
        and scale.is_contiguous()
        and not scale.requires_grad
    )


def _dequantize(high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None, backend: str) -> Tensor:
    validation.check_slot_values(slots, high.shape[0])
    return backends.get(backend).dequantize(high, low, scale, slots)


def _dequantize_fake(high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None, backend: str) -> Tensor:  # noqa: ARG001
    N = high.shape[0] if slots is None else slots.shape[0]
    return high.new_empty(N, *high.shape[1:], dtype=torch.float32)


def _quantize(states: Tensor, high: Tensor, low: Tensor, scale: Tensor, slots: Tensor | None, backend: str) -> None:
    validation.check_slot_values(slots, high.shape[0])
    backends.get(backend).quantize(states, high, low, scale, slots)


dequantize = Operation(_dequantize, _dequantize_fake)
quantize = Operation(_quantize, nothing, writes=["high", "low", "scale"])
