"""What tests share: a float64 oracle that owes nothing to the package, problems to solve, and error budgets."""

from tests.support.numerics import budget, budget_used, relative_error
from tests.support.pool import ReferencePool
from tests.support.problem import Problem, cumulative, make_problem, problems
from tests.support.solve import Solution, misses, solve_exactly, solve_with

__all__ = [
    "Problem",
    "ReferencePool",
    "Solution",
    "budget",
    "budget_used",
    "cumulative",
    "make_problem",
    "misses",
    "problems",
    "relative_error",
    "solve_exactly",
    "solve_with",
]
