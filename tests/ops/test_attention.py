"""What ``lightning_attention`` promises its callers, on both backends."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_attention import LightningOutput, decay, lightning_attention, lightning_attention_decode
from tests.support import make_problem, relative_error, solve_with

BACKENDS = ["tiled", "reference"]
GRADIENTS = ("q", "k", "v", "log_decay", "initial_state")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"initial": False},
        {"kind": "none"},
        {"kind": "none", "initial": False},
        {"lengths": [2, 0, 5], "padding": 2},
        {"lengths": [66], "padding": 0},
    ],
    ids=str,
)
def test_gradcheck(options: dict, backend: str):
    problem = make_problem(**{"B": 2, "T": 66, "H": 2, "D": 2, "E": 1, "scale": 0.5, "dtype": torch.float64, **options})
    names = [name for name in GRADIENTS if getattr(problem, name) is not None]
    inputs = tuple(getattr(problem, name).requires_grad_() for name in names)

    def run(*values: Tensor) -> LightningOutput:
        given = dict.fromkeys(GRADIENTS) | dict(zip(names, values, strict=True))
        return lightning_attention(
            *(given[name] for name in GRADIENTS[:4]), scale=problem.scale, initial_state=given["initial_state"],
            output_final_state=True, cu_seqlens=problem.cu_seqlens, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_entry_of_the_jacobian(backend: str):
    """Slow mode of gradcheck, on a problem small enough."""
    q, k, v = (torch.randn(1, 3, 2, n, dtype=torch.float64, requires_grad=True) for n in (2, 2, 3))
    log_decay = torch.tensor([-0.3, -2.0], dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 3])

    def run(*x: Tensor) -> LightningOutput:
        return lightning_attention(
            *x[:4], initial_state=x[4], output_final_state=True, cu_seqlens=cu_seqlens, backend=backend
        )

    assert torch.autograd.gradcheck(run, (q, k, v, log_decay, start))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_asked_for_is_none(backend: str):
    problem = make_problem(T=70)
    result = lightning_attention(problem.q, problem.k, problem.v, problem.log_decay, backend=backend)
    assert isinstance(result, LightningOutput)
    assert result.final_state is None
    asked = lightning_attention(problem.q, problem.k, problem.v, problem.log_decay, output_final_state=True)
    assert asked.final_state.shape == (1, 2, 16, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype: torch.dtype, state: torch.dtype, backend: str):
    got = solve_with(make_problem(T=10, dtype=dtype), backend)
    assert got.output.dtype == got.q.dtype == got.k.dtype == got.v.dtype == dtype
    assert got.final_state.dtype == got.initial_state.dtype == got.log_decay.dtype == state


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_takes_a_float32_decay(backend: str):
    problem = make_problem(T=70, dtype=torch.float64)
    rounded = replace(problem, log_decay=problem.log_decay.float())
    same = replace(problem, log_decay=problem.log_decay.float().double())
    got, expected = solve_with(rounded, backend), solve_with(same, backend)
    assert got.log_decay.dtype == torch.float32
    assert torch.equal(got.output, expected.output)
    assert torch.equal(got.log_decay, expected.log_decay.float())


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_prefill_in_pieces_then_decode_is_one_prefill(piece: int):
    T, decoded, H, D = 1003, 5, 4, 32
    problem = make_problem(B=2, T=T, H=H, D=D, kind="alibi")
    q, k, v = problem.q, problem.k, problem.v
    expected = lightning_attention(
        q, k, v, problem.log_decay, initial_state=problem.initial_state, output_final_state=True
    )
    state, outputs = problem.initial_state, []
    for start in range(0, T - decoded, piece):
        part = slice(start, min(start + piece, T - decoded))
        out, state = lightning_attention(
            q[:, part], k[:, part], v[:, part], problem.log_decay, initial_state=state, output_final_state=True
        )
        outputs.append(out)
    for t in range(T - decoded, T):
        outputs.append(lightning_attention_decode(q[:, t], k[:, t], v[:, t], problem.log_decay, state)[:, None])
    got = torch.cat(outputs, 1)
    # λ^n as n roundings of λ: with ALiBi's slowest decay of 4 heads, 1.4e-6 for pieces of one token, 2e-7 for 64.
    assert relative_error(got, expected.output) <= 5e-6
    assert relative_error(state, expected.final_state) <= 5e-6
    assert relative_error(got.roll(1, 1), expected.output) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_initial_state_counts_as_the_numbers_it_holds(dtype: torch.dtype, backend: str):
    problem = make_problem(T=70)
    given = problem.initial_state.to(dtype).requires_grad_()
    expected = solve_with(replace(problem, initial_state=given.detach().float()), backend)
    out, final = lightning_attention(
        problem.q, problem.k, problem.v, problem.log_decay, scale=problem.scale, initial_state=given,
        output_final_state=True, backend=backend,
    )  # fmt: skip
    torch.autograd.backward((out, final), (problem.dout, problem.dfinal))
    assert torch.equal(out, expected.output)
    assert torch.equal(final, expected.final_state)
    assert final.dtype == torch.float32
    assert torch.equal(given.grad, expected.initial_state.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_through_the_state(backend: str):
    """Two pieces joined by their state, differentiated as one graph, have the gradients of the whole."""
    problem = make_problem(T=150, lengths=None)
    expected = solve_with(problem, backend)
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in GRADIENTS}
    q, k, v, log_decay, start = leaves.values()

    def run(part: slice, state: Tensor) -> LightningOutput:
        return lightning_attention(
            q[:, part], k[:, part], v[:, part], log_decay, initial_state=state, output_final_state=True,
            backend=backend,
        )  # fmt: skip

    first, state = run(slice(0, 70), start)
    second, state = run(slice(70, 150), state)
    out = torch.cat([first, second], 1)
    grads = torch.autograd.grad([out, state], list(leaves.values()), [problem.dout, problem.dfinal])
    for name, grad in zip(GRADIENTS, grads, strict=True):
        assert relative_error(grad, getattr(expected, name)) <= 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("result", ["output", "final_state"])
def test_either_result_may_go_unused(result: str, backend: str):
    problem = make_problem(T=70)
    unused = "dfinal" if result == "output" else "dout"
    zeroed = replace(problem, **{unused: torch.zeros_like(getattr(problem, unused))})
    expected = solve_with(zeroed, backend)
    leaves = [getattr(problem, name).detach().requires_grad_() for name in GRADIENTS]
    results = lightning_attention(*leaves[:4], initial_state=leaves[4], output_final_state=True, backend=backend)
    upstream = problem.dout if result == "output" else problem.dfinal
    grads = torch.autograd.grad(getattr(results, result), leaves, upstream, allow_unused=True, materialize_grads=True)
    for name, grad in zip(GRADIENTS, grads, strict=True):
        assert torch.equal(grad, getattr(expected, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_one_gradient_alone(name: str, backend: str):
    problem = make_problem(T=70)
    expected = solve_with(problem, backend)
    given = {n: getattr(problem, n).detach().requires_grad_(n == name) for n in GRADIENTS}
    out, final = lightning_attention(
        *list(given.values())[:4], initial_state=given["initial_state"], output_final_state=True, backend=backend
    )
    (grad,) = torch.autograd.grad([out, final], [given[name]], [problem.dout, problem.dfinal])
    assert torch.equal(grad, getattr(expected, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_decays_learn(backend: str):
    """Gradient descent on log_decay alone finds the decays that made the targets."""
    problem = make_problem(T=65, H=2, D=4)
    truth = torch.tensor([-0.2, -1.0])
    target = lightning_attention(problem.q, problem.k, problem.v, truth, backend=backend).output
    guess = torch.tensor([-0.5, -0.5], requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        out = lightning_attention(problem.q, problem.k, problem.v, guess, backend=backend).output
        (out - target).square().mean().backward()
        optimizer.step()
    assert guess.detach().tolist() == pytest.approx(truth.tolist(), abs=0.02)


def test_views_give_the_bits_of_copies():
    """Slices of one projection, [B, H, T, D] transposes, and expanded keys: strides with a unit last one."""
    B, T, H, D = 2, 100, 3, 8
    log_decay = decay.alibi(H)
    projection = torch.randn(B, T, 3 * H * D)
    sliced = [x.view(B, T, H, D) for x in projection.split(H * D, -1)]
    interleaved = torch.randn(B, T, H, 3, D).unbind(3)
    transposed = [torch.randn(B, H, T, D).transpose(1, 2) for _ in range(3)]
    one_head = [torch.randn(B, T, 1, D).expand(B, T, H, D) for _ in range(3)]
    for views in (sliced, interleaved, transposed, one_head):
        assert not any(x.is_contiguous() for x in views)
        got = _forward_backward([x.detach().requires_grad_() for x in views], log_decay)
        expected = _forward_backward([x.contiguous().requires_grad_() for x in views], log_decay)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def _forward_backward(qkv: list[Tensor], log_decay: Tensor) -> list[Tensor]:
    out = lightning_attention(*qkv, log_decay).output
    upstream = torch.arange(out.numel(), dtype=torch.float32).view(out.shape[0], *out.shape[:0:-1]).transpose(1, 3)
    return [out, *torch.autograd.grad(out, qkv, upstream.sin())]


def test_views_of_packed_tokens():
    H, D, log_decay = 3, 8, decay.alibi(3)
    cu_seqlens = torch.tensor([0, 10, 100])
    views = torch.randn(1, 105, 3, H, D).unbind(2)
    got = lightning_attention(*views, log_decay, cu_seqlens=cu_seqlens).output
    copies = lightning_attention(*(x.contiguous() for x in views), log_decay, cu_seqlens=cu_seqlens).output
    assert torch.equal(got, copies)


def test_cu_seqlens_may_be_a_view():
    problem = make_problem(lengths=[30, 40])
    strided = torch.stack([problem.cu_seqlens, problem.cu_seqlens], 1)[:, 0]
    assert not strided.is_contiguous()
    got, expected = solve_with(replace(problem, cu_seqlens=strided)), solve_with(problem)
    assert torch.equal(got.output, expected.output)
    assert torch.equal(got.k, expected.k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences_in_the_batch(backend: str):
    got = solve_with(make_problem(B=0, T=70), backend)
    assert got.output.shape == (0, 70, 2, 16)
    assert not got.log_decay.any()
