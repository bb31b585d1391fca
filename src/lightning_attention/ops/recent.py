"""The tokens that a pool's states have yet to take up."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_attention.ops import validation

#: Tokens, at most, that a ring holds.
LONGEST = 64

#: What an operation on a pool and its rings writes to.
WRITTEN = ("state", "recent_k", "recent_v", "recent_count", "state_low", "state_scale")


@dataclass(frozen=True, eq=False)
class RecentTokens:
    """A ring of the last tokens' keys and values for each row of a pool, so that steps need not write the states.

    Given as ``recent`` to the serving operations. A step reads the state and appends its token to the ring; a head
    folds what it holds into its state once in R tokens, other heads in other steps, so that each step writes 1/R of
    the states. A sequence's state is its row of the pool and its row of k, v and count: copy all four, to any slot, or
    have ``lightning_attention_fold`` make the pool's row whole first.

    Attributes:
        k: [S, H, R, D], the keys; token i of a row since it was last whole is at place i mod R. Places that are not in
            use may hold anything.
        v: [S, H, R, E], the values, of k's dtype.
        count: [S] int32, the tokens appended since the row was last whole, less multiples of R from 2 R on; 0: the ring
            is empty, and the pool's row is the state.
    """

    k: Tensor
    v: Tensor
    count: Tensor

    @classmethod
    def empty(
        cls,
        slots: int,
        num_heads: int,
        D: int,
        E: int,
        length: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
    ) -> "RecentTokens":
        """Empty rings for a pool [slots, num_heads, D, E].

        Args:
            slots: S.
            num_heads: H, of v.
            D: width of q and k.
            E: width of v.
            length: R, from 1 to 64.
            dtype: that of the k and v that will come, or float32 for those of 16 bits: a ring holds them exactly.
            device: that of the pool.

        Raises:
            TypeError, ValueError: ``length`` is no integer, or not from 1 to 64.
        """
        length = validation.integer("length", length, least=1, most=LONGEST)
        return cls(
            torch.zeros(slots, num_heads, length, D, dtype=dtype, device=device),
            torch.zeros(slots, num_heads, length, E, dtype=dtype, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )


def tensors(recent: RecentTokens | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the operators take them; of what is no RecentTokens, nothing that they would take."""
    return (recent.k, recent.v, recent.count) if isinstance(recent, RecentTokens) else (recent, None, None)


def check_recent(recent: RecentTokens | None, state: Tensor, q: Tensor) -> None:
    """The rings of a checked pool, for tokens like q: they hold them exactly."""
    if recent is None:
        return
    _check(state, recent)
    wanted = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((q.dtype, validation.state_dtype(q)))]
    came = str(recent.k.dtype).removeprefix("torch.")
    if came not in wanted:
        raise TypeError(
            f"recent.k has dtype {came}; it must be that of k, {' or '.join(wanted)}: a ring holds k and v exactly. "
            f"Make it with RecentTokens.empty(…, dtype=torch.{wanted[0]})"
        )


def check_rings(state: Tensor, recent: RecentTokens, log_decay: Tensor | None, is_quantized: bool) -> None:
    """A pool and its rings, without tokens."""
    validation.check_tensor("state", state)
    if state.ndim != 4 or 0 in state.shape[1:]:
        raise ValueError(f"state has shape {list(state.shape)}; it must be [S, H, D, E], H, D and E at least 1")
    _check(state, recent)
    validation.check_pool(state, recent.k[:, :, 0], recent.v[:, :, 0], None, state.shape[0], is_quantized)
    validation.check_log_decay(log_decay, recent.v[:, :, 0])


def _check(state: Tensor, recent: RecentTokens) -> None:
    if not isinstance(recent, RecentTokens):
        raise TypeError(f"recent is a {type(recent).__name__}; it must be RecentTokens")
    k, v, count = recent.k, recent.v, recent.count
    validation.check_tensor("recent.k", k)
    S, H, D, E = state.shape
    if k.ndim != 4 or not 1 <= k.shape[2] <= LONGEST:
        wanted = f"[S, H, R, D] = [{S}, {H}, R, {D}], R from 1 to {LONGEST}"
        raise ValueError(f"recent.k has shape {list(k.shape)}; it must be {wanted}")
    R = k.shape[2]
    for name, x, shape, meaning, types in (
        ("recent.k", k, (S, H, R, D), "[S, H, R, D]", validation.FLOATS),
        ("recent.v", v, (S, H, R, E), "[S, H, R, E]", (k.dtype,)),
        ("recent.count", count, (S,), "[S]", (torch.int32,)),
    ):
        validation.check_tensor(name, x)
        validation.check_device(name, x, state)
        validation.check_shape(name, x, shape, meaning)
        validation.check_dtype(name, x, types)
        if not (x if x.ndim == 1 else x[:1, 0]).is_contiguous() or (0 in x.stride() and x.numel() > 1):
            wanted = "it" if x.ndim == 1 else "all but S and H"
            raise ValueError(f"{name} has strides {list(x.stride())}; {wanted} must be contiguous")
    validation.check_no_grad(**{"recent.k": k, "recent.v": v})
