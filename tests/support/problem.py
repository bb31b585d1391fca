"""Problems for ``lightning_attention``: its arguments, with a gradient for each of its results."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention import decay

DECAYS = ("none", "zero", "alibi", "strong", "mixed")


@dataclass(frozen=True)
class Problem:
    """The arguments, and the gradients that reach the output and the final state."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    dout: Tensor
    dfinal: Tensor

    def absolute(self) -> "Problem":
        """The same sums with every term positive."""
        kept = ("log_decay", "cu_seqlens", "scale")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: x.abs() for n, x in values.items() if n not in kept and x is not None})

    def sequences(self) -> list[tuple[int, slice]]:
        """Row of the batch and tokens of each sequence."""
        if self.cu_seqlens is None:
            return [(b, slice(0, self.q.shape[1])) for b in range(self.q.shape[0])]
        cuts = self.cu_seqlens.tolist()
        return [(0, slice(start, stop)) for start, stop in pairwise(cuts)]


def cumulative(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """cu_seqlens of the lengths."""
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def log_decay_of(kind: str, H: int) -> Tensor | None:
    """One of DECAYS."""
    if kind == "none":
        return None
    if kind == "zero":
        return torch.zeros(H)
    if kind == "alibi":
        return decay.alibi(H)
    if kind == "strong":
        return torch.full((H,), -8.0)
    return torch.tensor([0.0, -1e-4, -0.7, -3.0, -30.0])[torch.arange(H) % 5]


def make_problem(
    B: int = 1,
    T: int = 100,
    H: int = 2,
    D: int = 16,
    E: int | None = None,
    *,
    Hk: int | None = None,
    dtype: torch.dtype = torch.float32,
    kind: str = "alibi",
    lengths: Sequence[int] | None = None,
    padding: int = 0,
    initial: bool = True,
    scale: float = 1.0,
    seed: int = 0,
    index_dtype: torch.dtype = torch.int64,
) -> Problem:
    """Random normal inputs; with ``lengths`` the sequences are packed, and ``padding`` tokens follow the last.

    q and k have Hk heads, or H.
    """
    generator = torch.Generator().manual_seed(seed)
    E, Hk = D if E is None else E, H if Hk is None else Hk
    cu_seqlens, N = None, B
    if lengths is not None:
        cu_seqlens, B, T, N = cumulative(lengths, index_dtype), 1, sum(lengths) + padding, len(lengths)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    state_dtype = torch.promote_types(dtype, torch.float32)
    q, k, v, dout = normal(B, T, Hk, D), normal(B, T, Hk, D), normal(B, T, H, E), normal(B, T, H, E)
    dfinal, state = (normal(N, H, D, E, of=state_dtype) for _ in range(2))
    log_decay = log_decay_of(kind, H)
    log_decay = None if log_decay is None else log_decay.to(state_dtype)
    return Problem(q, k, v, log_decay, state if initial else None, cu_seqlens, scale, dout, dfinal)


@st.composite
def problems(draw: st.DrawFn, max_tokens: int = 300) -> Problem:
    """Any sizes, dense or packed with empty sequences and padding, any decay, either index type."""
    size = st.integers(1, 40)
    packed = draw(st.booleans())
    H, Hk = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (2, 1), (6, 3), (6, 2)]))
    edge = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129])
    lengths = draw(st.lists(st.one_of(edge, st.integers(0, 100)), min_size=1, max_size=5)) if packed else None
    return make_problem(
        B=draw(st.integers(1, 3)),
        T=draw(st.one_of(edge, st.integers(1, max_tokens))),
        H=H,
        Hk=Hk,
        D=draw(size),
        E=draw(size),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        kind=draw(st.sampled_from(DECAYS)),
        lengths=lengths,
        padding=draw(st.integers(0, 70)),
        initial=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.125, -2.0])),
        seed=draw(st.integers(0, 2**16)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )
