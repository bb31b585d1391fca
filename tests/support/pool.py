"""A pool of states as a dictionary in float64: what the serving operations do, token by token."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ReferencePool:
    """The state [H, D, E] of each slot; every method returns the outputs, in float64, and changes what it should."""

    def __init__(self, pool: Tensor, log_decay: Tensor | None, scale: float = 1.0) -> None:
        self.states = {slot: row.double() for slot, row in enumerate(pool)}
        rate = torch.zeros(pool.shape[1]) if log_decay is None else log_decay
        self.decay = rate.double().exp()[:, None, None]
        self.scale = scale
        self.after_drafts: list[Tensor | None] = []  # of the last verify: the state after each, None at padding

    def _after(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.repeat_interleave(len(v) // len(k), 0)
        return self.decay * state + k.double()[:, :, None] * v.double()[:, None, :]

    def _output(self, q: Tensor, state: Tensor) -> Tensor:
        q = q.repeat_interleave(len(state) // len(q), 0)
        return self.scale * torch.einsum("hd,hde->he", q.double(), state)

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        slots: Sequence[int],
        fresh: Sequence[bool] | None = None,
        snapshots: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> Tensor:
        """``snapshots`` holds, for each sequence, pairs of how many tokens and which slot."""
        out, t = torch.zeros(v.shape, dtype=torch.float64), 0
        taken: dict[int, Tensor] = {}
        for n, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
            if slot < 0:
                t += length
                continue
            state = self.states[slot]
            if fresh is not None and fresh[n]:
                state = torch.zeros_like(state)
            history = [state]
            for _ in range(length):
                state = self._after(state, k[t], v[t])
                out[t] = self._output(q[t], state)
                history.append(state)
                t += 1
            self.states[slot] = state
            for at, target in snapshots[n] if snapshots else ():
                if target >= 0 and 0 <= at <= length:
                    taken[target] = history[at]
        self.states |= taken
        return out

    def decode(self, q: Tensor, k: Tensor, v: Tensor, slots: Sequence[int]) -> Tensor:
        return self.prefill(q, k, v, [1] * len(slots), slots)

    def verify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        slots: Sequence[int],
        parents: Sequence[int] | None = None,
    ) -> Tensor:
        """Without ``parents`` every draft follows the one before it."""
        out, t = torch.zeros(v.shape, dtype=torch.float64), 0
        self.after_drafts = []
        for length, slot in zip(lengths, slots, strict=True):
            drafts: list[Tensor] = []
            for i in range(length):
                parent = i - 1 if parents is None else parents[t]
                if slot >= 0:
                    drafts.append(self._after(self.states[slot] if parent < 0 else drafts[parent], k[t], v[t]))
                    out[t] = self._output(q[t], drafts[i])
                t += 1
            self.after_drafts += drafts or [None] * length
        return out

    def commit(
        self, k: Tensor, v: Tensor, lengths: Sequence[int], slots: Sequence[int], accepted: Sequence[bool]
    ) -> None:
        t = 0
        for length, slot in zip(lengths, slots, strict=True):
            for _ in range(length):
                if slot >= 0 and accepted[t]:
                    self.states[slot] = self._after(self.states[slot], k[t], v[t])
                t += 1

    def stacked(self) -> Tensor:
        return torch.stack([self.states[slot] for slot in range(len(self.states))])
