"""What the layers share: a decay per head that keeps its numbers whatever is done to the layer, and serving."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_attention.ops.decode import lightning_attention_decode
from lightning_attention.ops.prefill import lightning_attention_prefill
from lightning_attention.ops.speculative import lightning_attention_commit, lightning_attention_verify
from lightning_attention.ops.validation import check_log_decay_values


class LinearAttentionLayer(nn.Module):
    """A layer with ``log_decay``, [H] float32, as a buffer that is no part of the state dict.

    It stays float32, and keeps its numbers, whatever is done to the layer: ``.bfloat16()`` would move a decay of 0.999
    by as much as 0.004, ``.to_empty()`` and the meta device leave none. A layer
    says what it makes of tokens before the operation (``_tokens``) and after it (``_finish``), and ``scale`` where it
    is not 1; :meth:`step`, :meth:`prefill`, :meth:`verify` and :meth:`commit` do the rest.

    Args:
        num_heads: H.
        log_decay: [H] float32, natural logarithm of each head's decay, none above 0.

    Raises:
        TypeError: ``log_decay`` is no tensor.
        ValueError: ``log_decay`` is not [H] float32 with values (it is on the meta device), requires a gradient, which
            a buffer does not get, or holds NaN or a value above 0.
    """

    log_decay: Tensor
    scale: float = 1.0

    def __init__(self, num_heads: int, log_decay: Tensor) -> None:
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
        # Kept as numbers too: loading a checkpoint by way of the meta device leaves no buffer to read them from.
        self._log_decay_values: list[float] = log_decay.tolist()
        self.register_buffer("log_decay", torch.tensor(self._log_decay_values, dtype=torch.float32), persistent=False)

    def reset_buffers(self) -> None:
        """Give ``log_decay`` its values again, on the device it is on; for buffers that were moved without them."""
        self.log_decay = torch.tensor(self._log_decay_values, dtype=torch.float32, device=self.log_decay.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LinearAttentionLayer":
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

    def step(self, x: Tensor, state: Tensor, *, positions: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """Mix one token per sequence and update the state in place; no gradients.

        Equal to ``forward`` on [B, 1, width], without a new state being allocated.

        Args:
            x: [B, width].
            state: [S, H, D, E] float32 or bfloat16, float64 in a float64 layer; updated in place.
            positions: [B] integers, each token's absolute position; required where the layer encodes positions.
            slots: [B] integers, the row of ``state`` each sequence owns; a negative slot is padding: its state is
                left alone and its attention output is zero. None: row i is sequence i's.

        Returns:
            The output, [B, width].

        Raises:
            ValueError: the layer encodes positions, and ``positions`` is None.
        """
        q, k, v, rest = self._tokens(x, positions)
        mixed = lightning_attention_decode(q, k, v, self.log_decay, state, slots=slots, scale=self.scale)
        return self._finish(mixed, rest)

    def prefill(
        self,
        x: Tensor,
        state: Tensor,
        *,
        cu_seqlens: Tensor,
        positions: Tensor | None = None,
        slots: Tensor | None = None,
        fresh: Tensor | None = None,
        snapshot_at: Tensor | None = None,
        snapshot_slots: Tensor | None = None,
    ) -> Tensor:
        """Mix N packed sequences of any lengths and update their states in place; no gradients.

        Prompts, further chunks of long prompts and single tokens go together in one call; a sequence of one token
        gets what :meth:`step` gives it.

        Args:
            x: [T, width].
            state: [S, H, D, E] float32 or bfloat16, float64 in a float64 layer; updated in place.
            cu_seqlens: [N+1] integers, sequence i is tokens cu_seqlens[i] to cu_seqlens[i+1]; later ones are padding.
            positions: [T] integers, each token's absolute position; required where the layer encodes positions.
            slots: [N] integers, the row of ``state`` each sequence owns, as in :meth:`step`.
            fresh: [N] bool, true for a sequence that starts from nothing, whatever its row holds; None: none does.
            snapshot_at: [N, P] integers: the state after this many tokens of the call (0 to the sequence's length) is
                written to the row in ``snapshot_slots``, for prefix caching. Other values write nothing.
            snapshot_slots: [N, P] integers, distinct rows of ``state``, none of them in ``slots``; negative: none.

        Returns:
            The output, [T, width].

        Raises:
            ValueError: the layer encodes positions, and ``positions`` is None.
        """
        q, k, v, rest = self._tokens(x, positions)
        mixed = lightning_attention_prefill(
            q, k, v, self.log_decay, state, cu_seqlens=cu_seqlens, slots=slots, fresh=fresh, scale=self.scale,
            snapshot_at=snapshot_at, snapshot_slots=snapshot_slots,
        )  # fmt: skip
        return self._finish(mixed, rest)

    def verify(
        self,
        x: Tensor,
        state: Tensor,
        *,
        cu_seqlens: Tensor,
        positions: Tensor | None = None,
        slots: Tensor | None = None,
        parents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix draft tokens, each after its ancestors and the state of its sequence; no state is touched, no gradients.

        Args:
            x: [T, width], the drafts of N sequences, packed.
            state: [S, H, D, E] float32 or bfloat16, read only.
            cu_seqlens: [N+1] integers: sequence i has the drafts cu_seqlens[i] to cu_seqlens[i+1], possibly none.
            positions: [T] integers, each draft's absolute position; required where the layer encodes positions. In a
                tree it is the tokens before the drafts plus the number of the draft's ancestors: siblings share one.
            slots: [N] integers, the row of ``state`` each sequence owns, as in :meth:`step`.
            parents: [T] integers, each draft's parent as its place among the drafts of its sequence, an earlier one,
                or -1 for the state. None: every draft follows the one before it.

        Returns:
            The output, [T, width], and the drafts' k [T, H, D] and v [T, H, E] for :meth:`commit`.

        Raises:
            ValueError: the layer encodes positions, and ``positions`` is None.
        """
        q, k, v, rest = self._tokens(x, positions)
        mixed = lightning_attention_verify(
            q, k, v, self.log_decay, state, cu_seqlens=cu_seqlens, slots=slots, parents=parents, scale=self.scale
        )
        return self._finish(mixed, rest), k, v

    def commit(
        self,
        k: Tensor,
        v: Tensor,
        state: Tensor,
        *,
        cu_seqlens: Tensor,
        accepted: Tensor,
        slots: Tensor | None = None,
        parents: Tensor | None = None,
    ) -> None:
        """Fold the accepted drafts into the states, in place, as if :meth:`step` had read them one by one.

        Args:
            k: [T, H, D], from :meth:`verify`.
            v: [T, H, E], from :meth:`verify`.
            state: [S, H, D, E] float32 or bfloat16, updated in place.
            cu_seqlens: [N+1] integers, as given to :meth:`verify`.
            accepted: [T] bool, for each sequence the drafts on one path from its state: of a chain the first so many.
            slots: [N] integers, as given to :meth:`verify`.
            parents: [T] integers, as given to :meth:`verify`; a path with a hole in it is found, on a CPU.
        """
        lightning_attention_commit(
            k, v, self.log_decay, state, cu_seqlens=cu_seqlens, accepted=accepted, slots=slots, parents=parents
        )

    @property
    def _encodes(self) -> bool:
        """Whether queries and keys depend on their positions."""
        raise NotImplementedError

    def _positions(
        self, x: Tensor, state: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor | None:
        """What ``forward`` over x [B, T, width] counts with: the given positions, or from 0 in every sequence."""
        if not self._encodes:
            return None
        if positions is not None:
            if positions.shape not in (x.shape[1:2], x.shape[:2]):  # rope would broadcast one to all
                came, (B, T) = list(positions.shape), x.shape[:2]
                raise ValueError(f"positions is {came}; it must be [{T}] or [{B}, {T}]")
            return positions
        if state is not None:
            raise ValueError("positions is None and state is given; rope and LRPE need every token's position")
        counted = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is None:
            return counted
        own = torch.searchsorted(cu_seqlens.contiguous(), counted.to(cu_seqlens.dtype), right=True) - 1
        return counted - cu_seqlens[own]

    def _check_positions(self, x: Tensor, positions: Tensor | None) -> None:
        """Whether each of the tokens x [T, width] has one, where the layer looks at them."""
        if self._encodes and (positions is None or positions.shape != x.shape[:1]):
            came = None if positions is None else list(positions.shape)
            raise ValueError(f"positions is {came}; rope and LRPE need the position of each token, [{len(x)}]")

    def _tokens(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What tokens [T, width] of any sequences become: q, k [T, H, D], v [T, H, E], and what ``_finish`` wants."""
        raise NotImplementedError

    def _finish(self, mixed: Tensor, rest: Tensor) -> Tensor:
        """The layer's output from the operation's, [..., H, E]."""
        raise NotImplementedError
