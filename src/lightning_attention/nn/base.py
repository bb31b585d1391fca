"""What the layers share: training and serving with one decay per head that keeps its value whatever moves the layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_attention.nn.positions import token_positions
from lightning_attention.ops.attention import lightning_attention
from lightning_attention.ops.decode import lightning_attention_decode
from lightning_attention.ops.prefill import lightning_attention_prefill
from lightning_attention.ops.recent import RecentTokens
from lightning_attention.ops.speculative import lightning_attention_commit, lightning_attention_verify
from lightning_attention.ops.validation import check_log_decay_values, check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FixedDecayAttention(nn.Module):
    """A layer around ``lightning_attention`` and the serving operations, with one fixed decay per head.

    :meth:`forward` reads whole sequences, from nothing or from a state, and is differentiable. :meth:`step`,
    :meth:`prefill`, :meth:`verify` and :meth:`commit` are the serving operations: they work in place on ``state``,
    [S, H, D, E] float32, bfloat16 or float16 (float64 in a float64 layer), a pool of which each sequence owns one row,
    and have no gradients. Arguments other than ``x`` and ``positions`` are the operation's own: it says what they mean,
    what is optional, and what it raises. Where the pool has rings of recent tokens, all of them are given these as
    ``recent``.

    ``positions`` are absolute: the number of the sequence's tokens before this one. A layer whose queries and keys
    depend on them raises a ValueError where they are missing and it cannot count them itself; other layers ignore them.

    ``log_decay`` is a buffer outside the state dict. It stays float32 and keeps its values whatever is done to the
    layer: ``.bfloat16()`` would change a decay of 0.999 by as much as 0.004, and ``.to_empty()`` or the meta device
    would lose it.

    A subclass defines ``state_shape``, ``_project`` and ``_finish``, and ``scale`` and ``_encodes_positions`` where the
    defaults are wrong.

    Args:
        hidden_size: width of the input and the output.
        num_heads: H.
        log_decay: [H] float32, natural logarithm of each head's decay, none above 0.

    Raises:
        TypeError: ``log_decay`` is not a tensor.
        ValueError: ``log_decay`` is not [H] float32 with values (it is on the meta device), requires a gradient, which
            a buffer does not get, or holds NaN or a value above 0.
    """

    log_decay: Tensor
    scale: float = 1.0

    def __init__(self, hidden_size: int, num_heads: int, log_decay: Tensor) -> None:
        super().__init__()
        if not isinstance(log_decay, Tensor):
            raise TypeError(
                f"log_decay is a {type(log_decay).__name__}; it must be a tensor, [{num_heads}] torch.float32"
            )
        if log_decay.shape != (num_heads,) or log_decay.dtype != torch.float32 or log_decay.is_meta:
            raise ValueError(
                f"log_decay is {list(log_decay.shape)} {log_decay.dtype} on {log_decay.device}; it must be "
                f"[{num_heads}] torch.float32 with values"
            )
        if log_decay.requires_grad:
            raise ValueError("log_decay requires a gradient; this layer's decays are fixed")
        check_log_decay_values(log_decay.cpu())
        self.hidden_size, self.num_heads = hidden_size, num_heads
        # Kept as numbers too: loading a checkpoint by way of the meta device leaves no buffer to read them from.
        self._log_decay_values: list[float] = log_decay.tolist()
        self.register_buffer("log_decay", torch.tensor(self._log_decay_values, dtype=torch.float32), persistent=False)

    def reset_buffers(self) -> None:
        """Restore the values of ``log_decay`` on the device where it is, after a move that left them behind."""
        self.log_decay = torch.tensor(self._log_decay_values, dtype=torch.float32, device=self.log_decay.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedDecayAttention":
        held = self.log_decay
        super()._apply(fn, recurse)
        # The function says where the buffer goes, not what is in it: .bfloat16() casts it, .to_empty() fills it with
        # whatever lay there.
        device = self.log_decay.device
        if held.is_meta and device.type != "meta":
            self.reset_buffers()
        elif self.log_decay is not held:
            self.log_decay = held.to(device)
        return self

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, D, E) of one sequence's state."""
        raise NotImplementedError

    def allocate_state(self, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A pool for that many sequences, [rows, H, D, E] zeros on the layer's device."""
        return torch.zeros(rows, *self.state_shape, dtype=dtype, device=self.log_decay.device)

    def allocate_recent(self, rows: int, length: int = 16) -> RecentTokens:
        """Empty rings of ``length`` tokens beside such a pool, in the dtype of the layer's k and v."""
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), self.log_decay.dtype)
        return RecentTokens.empty(rows, *self.state_shape, length, dtype, self.log_decay.device)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = False,
        group: "ProcessGroup | None" = None,
        local_cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix any number of tokens, starting from any state.

        Args:
            x: [B, T, hidden_size].
            state: [N, H, D, E] float32 (float64 in a float64 layer), the state before x; None for zeros. Unchanged;
                differentiable.
            positions: [T] or [B, T] integers. None counts from 0 in every sequence. With ``group``
                :func:`~lightning_attention.nn.token_positions` counts them, once for all layers.
            cu_seqlens: [N+1] integers: B is 1 and N sequences are packed in x; later tokens are padding. None: N = B.
            output_state: whether to return the state after x.
            group: process group whose ranks, in order, hold consecutive slices of each sequence, x being this rank's.
                ``state``, ``cu_seqlens`` and the new state are then as ``lightning_attention`` has them with a group.
            local_cu_seqlens: [M+1] integers, with ``group`` and ``cu_seqlens``: the tokens past ``cu_seqlens[-1]`` are
                not padding, but packed sequences that lie on this rank alone, for which nothing is sent. One of the
                boundaries is ``cu_seqlens[-1]``; boundaries before it are ignored.

        Returns:
            The output, like x, and the new state, like ``state``, or None.

        Raises:
            TypeError: ``x``, ``positions`` or ``cu_seqlens`` is no tensor, or ``group`` no process group.
            ValueError: ``x`` or ``positions`` has another shape, the layer encodes positions and ``state`` or ``group``
                is given without them, or ``local_cu_seqlens`` without ``group`` and ``cu_seqlens``.
        """
        self._check_width(x, "B", "T")
        if local_cu_seqlens is not None and (group is None or cu_seqlens is None):
            missing = "group" if group is None else "cu_seqlens"
            raise ValueError(f"local_cu_seqlens is given without {missing}; alone, give its sequences as cu_seqlens")
        q, k, v, rest = self._project(x, self._positions(x, state, positions, cu_seqlens, group))
        mixed, final = lightning_attention(
            q, k, v, self.log_decay, scale=self.scale, initial_state=state, output_final_state=output_state,
            cu_seqlens=cu_seqlens, group=group,
        )  # fmt: skip
        if local_cu_seqlens is not None and cu_seqlens is not None:
            alone = lightning_attention(q, k, v, self.log_decay, scale=self.scale, cu_seqlens=local_cu_seqlens).output
            crossing = torch.arange(x.shape[1], device=x.device) < cu_seqlens[-1]
            mixed = torch.where(crossing[:, None, None], mixed, alone)
        return self._finish(mixed, rest), final

    def step(
        self, x: Tensor, state: Tensor, *, positions: Tensor | None = None, slots: Tensor | None = None,
        recent: RecentTokens | None = None,
    ) -> Tensor:  # fmt: skip
        """Mix one token per sequence by ``lightning_attention_decode``: ``forward`` on [N, 1, hidden_size], in place.

        ``x`` is [N, hidden_size], and so is the output; ``positions`` and ``slots`` are [N] integers.
        """
        q, k, v, rest = self._tokens(x, positions, "N")
        mixed = lightning_attention_decode(q, k, v, self.log_decay, state, slots=slots, scale=self.scale, recent=recent)
        return self._finish(mixed, rest)

    def prefill(
        self, x: Tensor, state: Tensor, *, cu_seqlens: Tensor, positions: Tensor | None = None,
        slots: Tensor | None = None, fresh: Tensor | None = None, snapshot_at: Tensor | None = None,
        snapshot_slots: Tensor | None = None, recent: RecentTokens | None = None,
    ) -> Tensor:  # fmt: skip
        """Mix N packed sequences of any lengths by ``lightning_attention_prefill``.

        Prompts, further chunks of long prompts and single tokens go together in one call; a sequence of one token
        gets what :meth:`step` gives it. ``x`` is [T, hidden_size], and so is the output; ``cu_seqlens`` [N+1],
        ``positions`` [T], ``slots`` [N], ``snapshot_at`` and ``snapshot_slots`` [N, P] are integers, ``fresh`` is [N]
        bool.
        """
        q, k, v, rest = self._tokens(x, positions, "T")
        mixed = lightning_attention_prefill(
            q, k, v, self.log_decay, state, cu_seqlens=cu_seqlens, slots=slots, fresh=fresh, scale=self.scale,
            snapshot_at=snapshot_at, snapshot_slots=snapshot_slots, recent=recent,
        )  # fmt: skip
        return self._finish(mixed, rest)

    def verify(
        self, x: Tensor, state: Tensor, *, cu_seqlens: Tensor, positions: Tensor | None = None,
        slots: Tensor | None = None, parents: Tensor | None = None, recent: RecentTokens | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Mix draft tokens by ``lightning_attention_verify``, which leaves every state as it is.

        ``x`` is [T, hidden_size], the drafts of N sequences, packed; ``cu_seqlens`` [N+1], ``positions`` [T], ``slots``
        [N] and ``parents`` [T] are integers. In a tree a draft's position is the number of tokens before the drafts
        plus the number of its ancestors: siblings share one.

        Returns:
            The output, [T, hidden_size], and the drafts' k [T, H, D] and v [T, H, E] for :meth:`commit`.
        """
        q, k, v, rest = self._tokens(x, positions, "T")
        mixed = lightning_attention_verify(
            q, k, v, self.log_decay, state, cu_seqlens=cu_seqlens, slots=slots, parents=parents, scale=self.scale,
            recent=recent,
        )  # fmt: skip
        return self._finish(mixed, rest), k, v

    def commit(
        self, k: Tensor, v: Tensor, state: Tensor, *, cu_seqlens: Tensor, accepted: Tensor,
        slots: Tensor | None = None, parents: Tensor | None = None, recent: RecentTokens | None = None,
    ) -> None:  # fmt: skip
        """Fold the accepted drafts into the states by ``lightning_attention_commit``.

        ``k`` and ``v`` are from :meth:`verify`, ``cu_seqlens``, ``slots`` and ``parents`` what was given to it, and
        ``accepted`` is [T] bool.
        """
        lightning_attention_commit(
            k, v, self.log_decay, state, cu_seqlens=cu_seqlens, accepted=accepted, slots=slots, parents=parents,
            recent=recent,
        )  # fmt: skip

    @property
    def _encodes_positions(self) -> bool:
        """Whether queries and keys depend on their positions."""
        return False

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map x [..., hidden_size] to q, k [..., H, D], v [..., H, E], and whatever ``_finish`` needs."""
        raise NotImplementedError

    def _finish(self, mixed: Tensor, rest: Tensor) -> Tensor:
        """The layer's output from the operation's, [..., H, E]."""
        raise NotImplementedError

    def _positions(
        self, x: Tensor, state: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None, group: object
    ) -> Tensor | None:
        """The positions for ``forward`` over x [B, T, hidden_size]: those given, or from 0 in every sequence."""
        if cu_seqlens is not None:
            check_tensor("cu_seqlens", cu_seqlens)
        if not self._encodes_positions:
            return None
        if positions is not None:
            check_tensor("positions", positions)
            if positions.shape not in (x.shape[1:2], x.shape[:2]):  # rope would broadcast one to all
                came, (B, T) = list(positions.shape), x.shape[:2]
                raise ValueError(f"positions is {came}; it must be [{T}] or [{B}, {T}]")
            return positions
        if group is not None:
            raise ValueError("positions is None and group is given; count them for all layers with nn.token_positions")
        if state is not None:
            raise ValueError("positions is None and state is given; rope and LRPE need every token's position")
        return token_positions(x, cu_seqlens=cu_seqlens)

    def _tokens(self, x: Tensor, positions: Tensor | None, count: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What ``_project`` makes of tokens of any sequences, each with its position where the layer looks at them."""
        self._check_width(x, count)
        if not self._encodes_positions:
            return self._project(x, None)
        if positions is not None:
            check_tensor("positions", positions)
        if positions is None or positions.shape != x.shape[:1]:
            came = None if positions is None else list(positions.shape)
            raise ValueError(f"positions is {came}; rope and LRPE need the position of each token, [{len(x)}]")
        return self._project(x, positions)

    def _check_width(self, x: Tensor, *leading: str) -> None:
        check_tensor("x", x)
        if x.ndim != len(leading) + 1 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x is {list(x.shape)}; it must be [{', '.join(leading)}, {self.hidden_size}]")
