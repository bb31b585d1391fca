"""With batch_invariant, the bits of a sequence's results do not depend on what else is in the batch, nor on chunks."""

from dataclasses import fields, replace
from unittest.mock import patch

import pytest
import torch

from lightning_attention import INVARIANT_CHUNK, lightning_attention_decode
from lightning_attention.kernels.reference.backend import BACKEND as REFERENCE
from lightning_attention.kernels.tiled import plan
from lightning_attention.kernels.tiled.backend import BACKEND as TILED
from lightning_attention.kernels.tiled.blocks import blocks_of
from tests.support import Problem, Solution, cumulative, make_problem, solve_with
from tests.support.chunks import read_in_chunks

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


def _first(prompt: Problem, T: int) -> Problem:
    return replace(prompt, **{name: getattr(prompt, name)[:, :T] for name in ("q", "k", "v", "dout")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "D", "E"), SIZES)
def test_chunks_have_the_bits_of_training(H: int, D: int, E: int, dtype: torch.dtype):
    prompt = make_problem(T=200, H=H, D=D, E=E, dtype=dtype)
    for T, cuts, at in ((200, [64], 64), (200, [128, 192], 100), (129, [128], 129), (128, [64], 0)):
        part = _first(prompt, T)
        expected = solve_with(part, batch_invariant=True)
        for calls in ([], cuts):
            out, state, snapshot = read_in_chunks(TILED.prefill, part, calls, at)
            assert torch.equal(out, expected.output)
            assert torch.equal(state, expected.final_state)
            if at <= [*calls, T][0]:
                assert torch.equal(snapshot, read_in_chunks(TILED.prefill, _first(part, at))[1])


def test_chunks_may_be_cut_there_on_every_backend():
    assert INVARIANT_CHUNK % plan.BLOCK == 0


def test_chunks_of_the_definition_in_float64():
    """Whose states are rounded to the pool's type after every call, and so only there."""
    prompt = make_problem(T=20, D=5, E=7, dtype=torch.float64)
    out, state, _ = read_in_chunks(REFERENCE.prefill, prompt, [3, 16])
    expected = solve_with(prompt, "reference", batch_invariant=True)
    assert torch.equal(out, expected.output)
    assert torch.equal(state, expected.final_state)


def test_decoding_alone_and_with_others():
    """Sizes at which a matrix product has other bits in another batch."""
    torch.manual_seed(0)
    for H, D, E, N in ((3, 100, 7, 3), (3, 128, 17, 3), (1, 17, 33, 2), (2, 64, 7, 2), (3, 128, 5, 40)) * 5:
        (q, k), v, pool = torch.randn(2, N, H, D), torch.randn(N, H, E), torch.randn(N, H, D, E)
        rate, slots, own, n = -torch.rand(H), torch.randperm(N), pool.clone(), N // 2
        out = lightning_attention_decode(q, k, v, rate, pool, slots=slots, batch_invariant=True)
        one = (x[n : n + 1].clone() for x in (q, k, v))
        alone = lightning_attention_decode(*one, rate, own, slots=slots[n : n + 1], batch_invariant=True)
        assert torch.equal(out[n : n + 1], alone)
        assert torch.equal(pool[slots[n]], own[slots[n]])


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
