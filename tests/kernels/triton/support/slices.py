"""A problem cut into slices, a slice a rank, all of them computed in this process one after another."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.support import Problem, Solution, cumulative

Cut = Sequence[int] | Sequence[Sequence[int]]  # how many tokens each rank has, or how many of each packed sequence


class _NotYet(Exception):
    """Another rank has yet to send its message."""


@dataclass(eq=False)
class Mates:
    """A rank whose message is kept, and that is all until every rank's is. ``events``: what it is asked for."""

    rank: int
    size: int
    messages: dict[int, Tensor]
    events: list[str]

    def gather(self, message: Tensor, gathered: Tensor, *, meanwhile: bool = False) -> Callable[[], object]:
        if len(self.messages) < self.size:
            self.messages[self.rank] = message.clone()
            raise _NotYet
        self.events.append("start, to go on" if meanwhile else "start")

        def wait() -> None:
            self.events.append("wait")
            torch.cat([self.messages[r] for r in range(self.size)], out=gathered)

        return wait


def places(problem: Problem, cut: Cut) -> list[Tensor]:
    """Which tokens of the problem each rank has, in its order."""
    if problem.cu_seqlens is None:
        return list(torch.arange(problem.q.shape[1]).split(list(cut)))
    starts = problem.cu_seqlens[:-1].cpu() + torch.tensor(cut).cumsum(0) - torch.tensor(cut)
    return [
        torch.cat([torch.arange(s, s + n) for s, n in zip(own.tolist(), lengths, strict=True)])
        for own, lengths in zip(starts, cut, strict=True)
    ]


def solve_in_slices(
    whole: Problem, cut: Cut, final: bool, batch_invariant: bool, forward: Callable[..., Any],
    backward: Callable[..., Any], events: list[str],
) -> tuple[Solution, list[str]]:  # fmt: skip
    """By ``Backend.sequence_parallel`` and its backward, and what of ``events`` is of the last rank's passes.

    The loss is that of all ranks, and the first rank's has the final state in it.
    """
    ranks, tokens = len(cut), places(whole, cut)
    parts = []
    for r, own in enumerate(tokens):
        arrays = {name: getattr(whole, name)[:, own] for name in ("q", "k", "v", "dout")}
        cu_seqlens = None
        if whole.cu_seqlens is not None:
            cu_seqlens = cumulative(cut[r]).to(whole.cu_seqlens)
            tail = {name: x.new_full((1, 3, *x.shape[2:]), torch.nan) for name, x in arrays.items()}
            arrays = {name: torch.cat([x, tail[name]], 1) for name, x in arrays.items()}  # nobody may read the tail
        parts.append(replace(whole, **arrays, cu_seqlens=cu_seqlens))
    results: list[Any] = [()] * ranks
    seen: list[str] = []

    def each(run: Callable[[int, Mates], Any]) -> None:
        messages: dict[int, Tensor] = {}
        for r in (*range(ranks), *range(ranks)):
            events.clear()
            with nullcontext() if len(messages) == ranks else suppress(_NotYet):
                results[r] = (*results[r], *run(r, Mates(r, ranks, messages, events)))
        seen.extend(events)

    def there(r: int, mates: Mates) -> Any:
        p = parts[r]
        return forward(
            p.q, p.k, p.v, p.log_decay, p.initial_state, p.cu_seqlens, p.scale, final, batch_invariant, mates
        )

    def back(r: int, mates: Mates) -> Any:
        p, (_, _, start, lengths) = parts[r], results[r]
        dfinal = (p.dfinal if r == 0 else torch.zeros_like(p.dfinal)) if final else None
        dout = p.dout.transpose(1, 3).contiguous().transpose(1, 3)  # autograd gives it any strides
        return backward(
            dout, dfinal, p.q, p.k, p.v, p.log_decay, start, p.cu_seqlens, lengths, p.scale, batch_invariant,
            p.log_decay is not None, mates,
        )  # fmt: skip

    each(there)
    each(back)

    def joined(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
        found = torch.zeros_like(like)
        for own, x in zip(tokens, pieces, strict=True):
            assert not x[:, len(own) :].any()
            found[:, own] = x[:, : len(own)]
        return found

    outs, finals, _, _, dq, dk, dv, dlog_decay, dstart = zip(*results, strict=True)
    if final:
        assert all(torch.equal(x, finals[0]) for x in finals)
    solution = Solution(
        joined(outs, whole.v), finals[0] if final else torch.zeros_like(whole.dfinal), joined(dq, whole.q),
        joined(dk, whole.k), joined(dv, whole.v), None if dlog_decay[0] is None else torch.stack(dlog_decay).sum(0),
        dstart[0] if whole.initial_state is not None else None,
    )  # fmt: skip
    return solution, seen
