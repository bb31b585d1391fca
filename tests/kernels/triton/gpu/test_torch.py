"""The kernels on the GPU as PyTorch uses them, and which bits can be relied on."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_attention import INVARIANT_CHUNK, decay, lightning_attention
from tests.kernels.triton.support.device import (
    DEVICE,
    assert_same_bits,
    counting_compilations,
    moved,
    needs_gpu,
    no_waiting,
    room_for,
    solve,
)
from tests.support import Problem, cumulative, make_problem, solve_with

pytestmark = needs_gpu
BF16, FP32 = torch.bfloat16, torch.float32
# What PyTorch's compiler warns of is not ours to mend.
compiler_may_warn = pytest.mark.filterwarnings("default")


def leaves(problem: Problem) -> list[Tensor]:
    """q, k, v, log_decay and initial_state, on the GPU and with gradients."""
    p = moved(problem)
    return [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v, p.log_decay, p.initial_state)]


def gradients(results: tuple[Tensor, ...], inputs: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(results, inputs, given))


def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, start: Tensor, cu_seqlens: Tensor | None = None):
    return tuple(
        lightning_attention(
            q, k, v, log_decay, initial_state=start, output_final_state=True, cu_seqlens=cu_seqlens, backend="triton"
        )
    )


def test_it_is_the_default():
    problem = moved(make_problem(T=130, D=128, dtype=BF16))
    assert_same_bits(solve_with(problem), solve_with(problem, "triton"))


REPEATED = {
    "dense": {"B": 2, "T": 1000, "H": 32, "D": 128},
    "segments": {"T": 20_011, "H": 2, "D": 128},
    "packed": {"lengths": [0, 2000, 1, 7001, 333], "padding": 77, "H": 4, "D": 128},
    "float32": {"B": 2, "T": 1000, "H": 4, "D": 64, "dtype": FP32},
}


@pytest.mark.parametrize("case", REPEATED)
def test_the_same_bits_every_time(case: str):
    problem = moved(make_problem(**{"dtype": BF16, **REPEATED[case]}))
    expected = solve(problem)
    for _ in range(100):
        assert_same_bits(solve_with(problem, "triton"), expected)


PER_TOKEN, PER_SEQUENCE = ("output", "q", "k", "v"), ("final_state", "initial_state")
ARRAYS = ("q", "k", "v", "dout")


def _one(whole: Problem, row: int, tokens: slice, sequence: int) -> Problem:
    arrays = {name: getattr(whole, name)[row : row + 1, tokens] for name in ARRAYS}
    states = {name: getattr(whole, name)[sequence : sequence + 1] for name in ("initial_state", "dfinal")}
    return replace(whole, cu_seqlens=None, **arrays, **states)


def _check_one(whole: Problem, row: int, tokens: slice, sequence: int) -> None:
    """That a sequence has the same bits alone."""
    got = solve(whole, batch_invariant=True)
    alone = solve(_one(whole, row, tokens, sequence), batch_invariant=True)
    for name in PER_TOKEN:
        assert torch.equal(getattr(got, name)[row : row + 1, tokens], getattr(alone, name)), name
    for name in PER_SEQUENCE:
        assert torch.equal(getattr(got, name)[sequence : sequence + 1], getattr(alone, name)), name


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 128), (BF16, 64), (BF16, 20), (torch.float16, 128)])
def test_batch_invariance(dtype: torch.dtype, width: int):
    _check_one(make_problem(B=3, T=1000, D=width, dtype=dtype), 1, slice(None), 1)
    for before in (1, 64, 77, 3000):
        packed = make_problem(lengths=[before, 1000, 9], padding=5, D=width, dtype=dtype)
        _check_one(packed, 0, slice(before, before + 1000), 1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("dtype", "width"), [(BF16, 128), (BF16, 64), (BF16, 256), (torch.float16, 128), (FP32, 64)])
def test_batch_invariance_of_long_sequences(dtype: torch.dtype, width: int, seed: int):
    """Sequences of several segments that end in every way: random lengths, whole segments, a token more."""
    options = {"H": 8 if width <= 128 else 2, "D": width, "dtype": dtype, "seed": seed}
    lengths = torch.randint(1, 20_000, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths += [2 * INVARIANT_CHUNK, INVARIANT_CHUNK + 1, 1]
    packed = make_problem(lengths=lengths, padding=5, **options)
    for n, length in enumerate(lengths):
        before = sum(lengths[:n])
        _check_one(packed, 0, slice(before, before + length), n)
    for T in (lengths[0], 2 * INVARIANT_CHUNK):
        _check_one(make_problem(B=3, T=T, **options), 1, slice(None), 1)


@pytest.mark.parametrize("cut", [64, 640, 960])
@pytest.mark.parametrize(("dtype", "width"), [(BF16, 128), (BF16, 64), (FP32, 64)])
def test_a_prefill_in_two_at_the_end_of_a_block(dtype: torch.dtype, width: int, cut: int):
    whole = make_problem(T=1000, D=width, dtype=dtype)

    def part(tokens: slice, **changes: Tensor) -> Problem:
        return replace(whole, **{name: getattr(whole, name)[:, tokens] for name in ARRAYS}, **changes)

    expected = solve(whole, batch_invariant=True)
    first = solve(part(slice(cut)), batch_invariant=True)
    last = solve(part(slice(cut, None), initial_state=first.final_state), batch_invariant=True)
    assert torch.equal(torch.cat([first.output, last.output], 1), expected.output)
    assert torch.equal(last.final_state, expected.final_state)


def test_views_need_no_copy():
    p = moved(make_problem(B=2, T=300, H=4, D=128, dtype=BF16))
    expected = solve(p)
    qkv = torch.stack([p.q, p.k, p.v], 2)
    turned = {name: getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ARRAYS}
    states = {name: getattr(p, name).mT.contiguous().mT for name in ("initial_state", "dfinal")}
    views = [replace(p, q=qkv[:, :, 0], k=qkv[:, :, 1], v=qkv[:, :, 2]), replace(p, **turned, **states)]
    for same in views:
        assert_same_bits(solve(same), expected)

    unit = p.q.numel() * 2
    torch.cuda.synchronize()
    for same in views:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        lightning_attention(same.q, same.k, same.v, same.log_decay, backend="triton")
        assert torch.cuda.max_memory_allocated() - before < 1.1 * unit  # the output, and no copy


def test_the_gradient_of_a_sum():
    """Autograd hands over one number seen as a tensor, every stride 0."""
    inputs = leaves(make_problem(T=300, D=128, dtype=BF16))
    out, _ = attend(*inputs)
    expected = gradients((out,), inputs, [torch.ones_like(out)])
    for got, want in zip(gradients((attend(*inputs)[0].sum(),), inputs, [None]), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("B", "T", "H"), [(4, 8192, 32), (1, 131_072, 8)])
def test_memory(B: int, T: int, H: int):
    """Forward and backward hold q, k, v, o, do and three gradients, and 5 % more."""
    unit = B * T * H * 128 * 2
    room_for(10 * unit / 1e9)
    base = torch.cuda.memory_allocated()
    q, k, v, dout = (torch.randn(B, T, H, 128, device=DEVICE, dtype=BF16) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    out = lightning_attention(*inputs, decay.alibi(H).to(DEVICE)).output
    gradients((out,), inputs, [dout])
    assert torch.cuda.max_memory_allocated() - base <= 8 * unit * 1.05


# Of what is compiled, on the first call alone

NEW_SIZES = [(1, 1), (1, 100), (7, 333), (2, 4000), (1, 20_000), (1, 50_000)]


def test_a_new_length_or_batch_compiles_nothing():
    def run(B: int, T: int, lengths: list[int] | None = None) -> None:
        solve_with(moved(make_problem(B=B, T=T, D=128, lengths=lengths, dtype=BF16)), "triton")

    for T in (500, 30_000):  # cut into segments or not, dense and packed
        run(1, T)
        run(1, T, [T - 100, 100])
    with counting_compilations() as compiled:
        for B, T in NEW_SIZES:
            run(B, T)
            run(1, T, [T // 3, 0, T - T // 3])
    assert not compiled


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_never_waits():
    q, k, v, log_decay, start = leaves(make_problem(lengths=[300, 0, 1000], padding=50, D=128, dtype=BF16))
    cu_seqlens = cumulative([300, 0, 1000]).to(DEVICE)
    given = [torch.ones_like(q), torch.ones_like(start)]

    def run() -> list[Tensor]:
        return gradients(attend(q, k, v, log_decay, start, cu_seqlens), [q, k, v, log_decay, start], given)

    expected = run()
    torch.cuda.synchronize()
    with no_waiting():
        with pytest.raises(RuntimeError):
            cu_seqlens.tolist()  # it does notice
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_in_a_new_thread():
    """Where no context of the device is bound yet."""
    problem = moved(make_problem(T=300, D=128, dtype=BF16))
    results: list[Tensor] = []

    def run() -> None:
        results.append(lightning_attention(problem.q, problem.k, problem.v, problem.log_decay).output)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    run()
    assert torch.equal(*results)


# Inside CUDA graphs and torch.compile, checkpointed, under autocast


def _warmed_up(run: Callable[[], object]) -> None:
    """As capture asks for: a few runs on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("lengths", [None, [700, 0, 5000, 301]])
def test_cuda_graphs(lengths: list[int] | None, backward: bool):
    T = 6011

    def draw(lengths: list[int] | None, seed: int) -> Problem:
        padding = 0 if lengths is None else T - sum(lengths)
        return moved(make_problem(T=T, D=128, dtype=BF16, lengths=lengths, padding=padding, seed=seed))

    problem = draw(lengths, 0)
    inputs, cu_seqlens = leaves(problem), problem.cu_seqlens
    given = [problem.dout, problem.dfinal]

    def run() -> list[Tensor]:
        results = attend(*inputs, cu_seqlens)
        return [x.detach() for x in results] + (gradients(results, inputs, given) if backward else [])

    _warmed_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed, other in ((1, [1, 5999, 0, 11]), (2, [2000, 2000, 2000, 0])):
        # New contents in the same places: numbers, decays and lengths.
        new = draw(None if lengths is None else other, seed)
        with torch.no_grad():
            for place, content in zip(inputs, leaves(new), strict=True):
                place.copy_(content)
            inputs[3].mul_(seed)
            for place, content in zip(given, (new.dout, new.dfinal), strict=True):
                place.copy_(content)
            if cu_seqlens is not None:
                cu_seqlens.copy_(new.cu_seqlens)
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


COMPILED = {
    "dense": {"B": 2, "T": 300, "D": 128},
    "packed": {"lengths": [100, 0, 233], "padding": 7, "D": 128},
}


@compiler_may_warn
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_whole_forward_and_backward(case: str):
    problem = moved(make_problem(**COMPILED[case], dtype=BF16))
    inputs = leaves(problem)

    def model(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        out, final = attend(2 * q, k, v, log_decay, start, problem.cu_seqlens)
        return 3 * out, final

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    given = [problem.dout, problem.dfinal]
    expected, got = model(*inputs), compiled(*inputs)
    # Products with 2 and, up to a rounding, with 3 are exact, so what is fused does not matter.
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(got, inputs, given), gradients(expected, inputs, given), strict=True):
        assert torch.equal(a, b)
    torch.compiler.reset()


@compiler_may_warn
@pytest.mark.parametrize("case", COMPILED)
def test_opcheck(case: str):
    problem = moved(make_problem(**COMPILED[case], dtype=BF16))
    q, k, v, log_decay, start = leaves(problem)
    rest = (problem.cu_seqlens, problem.scale)
    operators = torch.ops.lightning_attention
    torch.library.opcheck(operators.attention.default, (q, k, v, log_decay, start, *rest, True, False, "triton"))
    inputs = (problem.q, problem.k, problem.v, problem.log_decay, problem.initial_state, *rest)
    arguments = (problem.dout, problem.dfinal, *inputs, False, True, "triton")
    torch.library.opcheck(operators.attention_backward.default, arguments)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool):
    inputs = leaves(make_problem(T=5000, D=128, dtype=BF16))

    def loss(results: tuple[Tensor, Tensor]) -> Tensor:
        return results[0].float().sin().sum() + results[1].sin().sum()

    def grads(results: tuple[Tensor, Tensor]) -> list[Tensor]:
        for x in inputs:
            x.grad = None
        loss(results).backward()
        return [x.grad for x in inputs]

    expected = grads(attend(*inputs))
    for got, want in zip(grads(checkpoint(attend, *inputs, use_reentrant=reentrant)), expected, strict=True):
        assert torch.equal(got, want)


def test_autocast():
    q, k, v, log_decay, start = leaves(make_problem(T=300, D=128))
    with torch.autocast("cuda", dtype=BF16):
        out, final = attend(q, k, v, log_decay, start)
        got = gradients((out.float().sum() + final.sum(),), [q, k, v, log_decay, start], [None])
    half = [x.detach().to(BF16).requires_grad_() for x in (q, k, v)]
    expected_out, expected_final = attend(*half, log_decay, start)
    total = (expected_out.float().sum() + expected_final.sum(),)
    expected = gradients(total, [*half, log_decay, start], [None])
    assert out.dtype == BF16
    assert torch.equal(out, expected_out)
    assert torch.equal(final, expected_final)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_an_integer_scale():
    """Python's numbers have types, and a kernel is compiled for the type of its first call."""
    p = moved(make_problem(T=130, H=3, D=72, dtype=BF16))
    twice, half = (lightning_attention(p.q, p.k, p.v, p.log_decay, scale=scale).output for scale in (2, 0.5))
    assert torch.equal(twice, 4 * half)
