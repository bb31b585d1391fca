"""What a sweep is to the code that launches it: its kernels, and how they take tensors. A chip adds one."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from lightning_attention.kernels.triton.tiling import TensorView, Tiles


class Sweep(NamedTuple):
    """Kernels whose arguments differ in nothing but how they take a tensor [B, T, H, *].

    ``read``: one that is read, or None, by all of its columns; ``read_tile``: by those that a program has; ``narrow``:
    the same of one that is also read by all; ``write``: a contiguous one that is written. They are given the tensor,
    its view, the tiles and the columns of a block.
    """

    forward: Any
    backward: Any
    states: Any
    snapshot: Any
    read: Callable[[Tensor | None, TensorView | None, Tiles, int], tuple[Any, ...]]
    read_tile: Callable[[Tensor | None, TensorView | None, Tiles, int], tuple[Any, ...]]
    narrow: Callable[[Tensor, TensorView, Tiles, int], tuple[Any, ...]]
    write: Callable[[Tensor, TensorView, Tiles, int], tuple[Any, ...]]
    launch: Callable[[Any, tuple[int, int, int], Sequence[Any], tuple[Any, ...], int, int], None]


@cache
def sweep_for(name: str) -> Sweep:
    """The sweep that tiles name."""
    if name == "hopper":
        from lightning_attention.kernels.triton.sweeps import hopper as gluon  # Gluon is not there on every platform

        return gluon.SWEEP
    if name == "hopper_float32":
        from lightning_attention.kernels.triton.sweeps import hopper_float32

        return hopper_float32.SWEEP
    from lightning_attention.kernels.triton.sweeps import portable

    return portable.SWEEP
