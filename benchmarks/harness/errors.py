"""Errors against float64: measured in the same run, and against a budget, as a record says it."""

from typing import Any

from torch import Tensor

from lightning_attention.bench.attention import Problem
from lightning_attention.bench.peers import Peer, ours
from lightning_attention.check import relative_error

#: Past this error the numbers of a peer are shown as wrong: half a dozen roundings of the inputs to bfloat16.
WRONG = 1e-2

#: What errors are taken of, in this order.
COMPARED = ("output", "dq", "dk", "dv", "dlog_decay")


def within(budget: float, error: float) -> dict[str, Any]:
    """The relative error as fields of a record; one past its budget makes the record a failure."""
    wrong = {} if error <= budget else {"error": f"relative error {error:.1e}, allowed {budget:.0e}"}
    return {"relative_error": error} | wrong


def mark(error: float | str) -> str:
    """What a table says of a peer with this error, a number or, where it is none, a record's word for it."""
    return "" if float(error) <= WRONG else ", wrong"


def _slice(x: Tensor, problem: Problem) -> Tensor:
    """The first head, which forgets fastest, and the last, which forgets slowest, of the last sequence.

    Where log_decay is learnable, of all sequences: its gradient is a sum over them.
    """
    heads = sorted({0, problem.shape.H - 1})
    if x.ndim == 1:
        return x[heads]
    return (x if problem.learnable else x[-1:])[:, :, heads]


def reference(problem: Problem, exact: Peer | None = None) -> dict[str, Tensor]:
    """Output and gradients of the slice in float64.

    By the tiled backend, which the tests hold against the recurrence: the recurrence itself would take minutes.
    ``exact``: another way to call it.
    """
    sliced = problem.changed(lambda x: _slice(x, problem).double())
    sliced.log_decay = None if problem.log_decay is None else _slice(problem.log_decay, problem)
    return dict(zip(COMPARED, sliced.results(exact or ours("tiled")), strict=False))


def errors(problem: Problem, peer: Peer, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius errors of the implementation's output and gradients on the slice."""
    found = zip(COMPARED, problem.results(peer), strict=False)
    return {name: relative_error(_slice(x, problem), wanted[name]) for name, x in found}
