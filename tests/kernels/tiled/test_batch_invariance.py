"""With batch_invariant, the bits of a sequence's results do not depend on what else is in the batch."""

from dataclasses import fields, replace
from unittest.mock import patch

import pytest
import torch

from lightning_attention.kernels.tiled import plan
from lightning_attention.kernels.tiled.blocks import blocks_of
from tests.support import Problem, Solution, cumulative, make_problem, solve_with

# Odd sizes too: there the bits of a matrix product depend on where in memory its operands begin.
SIZES = [(4, 64, 64), (3, 5, 7), (1, 33, 1), (2, 2, 33), (1, 1, 16)]
PER_SEQUENCE = ("output", "final_state", "q", "k", "v", "initial_state")


def _joined(problems: list[Problem], dim: int) -> Problem:
    names = [f.name for f in fields(Problem) if isinstance(getattr(problems[0], f.name), torch.Tensor)]
    state_like = ("initial_state", "dfinal")
    joined = {
        name: torch.cat([getattr(p, name) for p in problems], 0 if name in state_like else dim)
        for name in names
        if name not in ("log_decay", "cu_seqlens")
    }
    return replace(problems[0], **joined)


def _assert_same_bits(got: Solution, alone: Solution, row: int, tokens: slice, sequence: int):
    for name in PER_SEQUENCE:
        x = getattr(got, name)
        state = name in ("final_state", "initial_state")
        own = x[sequence : sequence + 1] if state else x[row : row + 1, tokens]
        assert torch.equal(own, getattr(alone, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "D", "E"), SIZES)
def test_alone_in_a_batch_and_packed(H: int, D: int, E: int, dtype: torch.dtype):
    def of(T: int, seed: int) -> Problem:
        return make_problem(T=T, H=H, D=D, E=E, dtype=dtype, seed=seed)

    own = of(200, 0)
    alone = solve_with(own, batch_invariant=True)

    batch = _joined([of(200, 1), own, of(200, 2)], 0)
    _assert_same_bits(solve_with(batch, batch_invariant=True), alone, 1, slice(None), 1)

    for before in (1, 64, 100, 2000):  # 2000: a piece ends within the sequence
        packed = _joined([of(before, 1), own, of(9, 2)], 1)
        packed = replace(packed, cu_seqlens=cumulative([before, 200, 9]))
        _assert_same_bits(solve_with(packed, batch_invariant=True), alone, 0, slice(before, before + 200), 1)


@pytest.mark.parametrize("cut", [64, 128, 192])
@pytest.mark.parametrize(("H", "D", "E"), SIZES)
def test_a_prefill_in_two_at_the_end_of_a_block(H: int, D: int, E: int, cut: int):
    whole = make_problem(T=200, H=H, D=D, E=E)
    expected = solve_with(whole, batch_invariant=True)

    def tokens(part: slice) -> dict[str, torch.Tensor]:
        return {name: getattr(whole, name)[:, part] for name in ("q", "k", "v", "dout")}

    first = solve_with(replace(whole, **tokens(slice(cut))), batch_invariant=True)
    second = replace(whole, initial_state=first.final_state, **tokens(slice(cut, None)))
    last = solve_with(second, batch_invariant=True)
    assert torch.equal(torch.cat([first.output, last.output], 1), expected.output)
    assert torch.equal(last.final_state, expected.final_state)


@pytest.mark.parametrize("option", [False, True])
def test_odd_sizes_are_worked_on_in_whole_cache_lines(option: bool):
    """The option does something; without it a small odd size is not padded to many times itself."""
    sizes = set()

    def spy(x: torch.Tensor, *arguments: object) -> object:
        sizes.add(x.shape[-1])
        return blocks_of(x, *arguments)

    with patch.object(plan, "blocks_of", spy):
        solve_with(make_problem(T=100, D=5, E=7), batch_invariant=option)
    assert sizes == {16 if option else 5}
