"""Problems solved: in closed form in float64, and with the package."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_attention import lightning_attention
from tests.support.numerics import budget_used
from tests.support.problem import Problem


@dataclass(frozen=True)
class Solution:
    """Results and gradients of a problem; None for what it has no argument for."""

    output: Tensor
    final_state: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None

    def misses(self, expected: "Solution", magnitude: "Solution") -> dict[str, float]:
        """Results and gradients past their budget, and by what factor; see ``budget_used``."""
        misses = {}
        for field in fields(self):
            got, want = getattr(self, field.name), getattr(expected, field.name)
            assert (got is None) == (want is None), field.name
            if got is None:
                continue
            gradient = field.name not in ("output", "final_state")
            size = getattr(magnitude, field.name)
            used = budget_used(got, want, size, self.output.dtype, gradient=gradient)
            if not used <= 1:
                misses[field.name] = used
        return misses


def _closed_form(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, start: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One sequence [T, H, X]: o_t = scale (Σ_s λ^(t−s) (q_t·k_s) v_s + λ^(t+1) q_t S_0), and its last state."""
    T = q.shape[0]
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    age = torch.arange(T, dtype=torch.float64)
    distance = age[:, None] - age
    weight = (rate[:, None, None] * distance.clamp(min=0)).exp() * (distance >= 0)
    scores = torch.einsum("thd,shd->hts", q, k) * weight
    faded = (rate * (age[:, None] + 1)).exp()
    out = torch.einsum("hts,she->the", scores, v) + faded[..., None] * torch.einsum("thd,hde->the", q, start)
    left = (rate * (T - 1 - age[:, None])).exp()
    final = (rate * T).exp()[:, None, None] * start + torch.einsum("th,thd,the->hde", left, k, v)
    return scale * out, final


def solve_exactly(problem: Problem) -> Solution:
    """In closed form, a sequence at a time, in float64; its gradients by automatic differentiation."""
    H = problem.v.shape[2]
    leaves = {
        name: None if x is None else x.detach().double().requires_grad_()
        for name in ("q", "k", "v", "log_decay", "initial_state")
        for x in [getattr(problem, name)]
    }
    q, k, v, log_decay, initial = leaves.values()
    rate = torch.zeros(H, dtype=torch.float64) if log_decay is None else log_decay
    out = torch.zeros(v.shape, dtype=torch.float64)
    finals = []
    for n, (b, tokens) in enumerate(problem.sequences()):
        start = q.new_zeros(H, q.shape[3], v.shape[3]) if initial is None else initial[n]
        y, final = _closed_form(q[b, tokens], k[b, tokens], v[b, tokens], rate, start, problem.scale)
        out = out.index_put((torch.tensor(b), torch.arange(tokens.start, tokens.stop)), y)
        finals.append(final)
    return _differentiated(out, torch.stack(finals), leaves, problem)


def misses(got: Solution, problem: Problem) -> dict[str, float]:
    """What of a solution is past its budget, against the closed form."""
    return got.misses(solve_exactly(problem), solve_exactly(problem.absolute()))


def solve_with(problem: Problem, backend: str | None = None, **options: bool) -> Solution:
    """With the package."""
    leaves = {
        name: None if x is None else x.detach().requires_grad_()
        for name in ("q", "k", "v", "log_decay", "initial_state")
        for x in [getattr(problem, name)]
    }
    out, final = lightning_attention(
        *list(leaves.values())[:4],
        scale=problem.scale,
        initial_state=leaves["initial_state"],
        output_final_state=True,
        cu_seqlens=problem.cu_seqlens,
        backend=backend,
        **options,
    )
    return _differentiated(out, final, leaves, problem)


def _differentiated(out: Tensor, final: Tensor, leaves: dict[str, Tensor | None], problem: Problem) -> Solution:
    wanted = [x for x in leaves.values() if x is not None]
    given = [problem.dout.to(out.dtype), problem.dfinal.to(final.dtype)]
    grads = iter(torch.autograd.grad([out, final], wanted, given, allow_unused=True, materialize_grads=True))
    return Solution(out.detach(), final.detach(), *(None if x is None else next(grads) for x in leaves.values()))
