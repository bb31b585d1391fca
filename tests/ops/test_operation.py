"""The operations as PyTorch sees them: compiled, under autocast, checkpointed, and what they save."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_attention import (
    QuantizedStates,
    RecentTokens,
    decay,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_fold,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from tests.support import Problem, Solution, make_problem, relative_error, solve_with

OPS = torch.ops.lightning_attention
H, D, E, S = 2, 4, 3, 5

PROBLEMS = {
    "dense": {"B": 2, "T": 70},
    "no decay, no initial state": {"T": 5, "kind": "none", "initial": False},
    "packed": {"lengths": [0, 66, 3], "padding": 2},
    "bfloat16": {"T": 65, "dtype": torch.bfloat16},
    "fewer heads of q and k": {"lengths": [66, 3], "Hk": 1},
}


def arguments(problem: Problem, backend: str = "tiled", requires_grad: bool = False) -> tuple:
    leaves = (problem.q, problem.k, problem.v, problem.log_decay, problem.initial_state)
    leaves = tuple(None if x is None else x.clone().requires_grad_(requires_grad) for x in leaves)
    return *leaves, problem.cu_seqlens, problem.scale, True, False, backend


# PyTorch 2.14's check itself looks at the .grad of what it made of our leaves.
opchecked = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@opchecked
@pytest.mark.parametrize("case", PROBLEMS)
def test_opcheck_attention(case: str):
    problem = make_problem(H=H, D=D, E=E, **PROBLEMS[case])
    torch.library.opcheck(OPS.attention.default, arguments(problem, requires_grad=True))


@opchecked
@pytest.mark.parametrize("case", ["dense", "packed", "fewer heads of q and k"])
def test_opcheck_attention_backward(case: str):
    problem = make_problem(H=H, D=D, E=E, **PROBLEMS[case])
    q, k, v, log_decay, start, cu_seqlens, scale, _, invariant, backend = arguments(problem)
    for need_dlog_decay, dfinal in ((True, problem.dfinal), (False, None)):
        args = (problem.dout, dfinal, q, k, v, log_decay, start, cu_seqlens, scale, invariant, need_dlog_decay, backend)
        torch.library.opcheck(OPS.attention_backward.default, args)


@opchecked
def test_opcheck_attention_on_the_reference_backend():
    problem = make_problem(H=H, D=D, E=E, lengths=[0, 3, 1], padding=1)
    torch.library.opcheck(OPS.attention.default, arguments(problem, "reference", requires_grad=True))


def serving_calls(pool_of: str) -> dict[str, tuple[Callable[..., Tensor | None], tuple, dict]]:
    """Each operation on a pool with its arguments; the fifth (commit: the fourth) is the pool.

    ``pool_of``: "floats"; "rings", with rings that hold a few tokens of each row, and fold; "8 bits", with rings too.
    """
    rings = pool_of != "floats"
    torch.manual_seed(0)
    T, log_decay = 7, decay.alibi(H)
    q, k, v = torch.randn(T, H, D), torch.randn(T, H, D), torch.randn(T, H, E)
    pool, slots, cu_seqlens = torch.randn(S, H, D, E), torch.tensor([3, -1, 0]), torch.tensor([0, 4, 5, 7])
    accepted = torch.tensor([True, True, False, False, True, True, False])
    packed = {"cu_seqlens": cu_seqlens, "slots": slots, "recent": None}
    snapshots = {
        "fresh": torch.tensor([False, True, True]),
        "snapshot_at": torch.tensor([[2], [0], [2]]),
        "snapshot_slots": torch.tensor([[1], [-1], [4]]),
    }
    tree = {"parents": torch.tensor([-1, 0, 0, 1, -1, -1, 0])}
    fold = {}
    if pool_of == "8 bits":
        states, pool = pool, QuantizedStates.empty(S, H, D, E)
        pool.quantize(states)
    if rings:
        keys, values = torch.randn(S, H, 4, D), torch.randn(S, H, 4, E)
        packed["recent"] = RecentTokens(keys, values, torch.tensor([3, 0, 7, 2, 5], dtype=torch.int32))
        fold["fold"] = (_fold, (pool, log_decay), {"slots": slots, "recent": packed["recent"]})
    recent = {"recent": packed["recent"]}
    after = {} if rings else {"snapshots": torch.zeros(4, H, D, E)}  # they do not go together
    if after:
        after["snapshot_slots"] = torch.tensor([[0, -1], [3, -1], [1, 2]])
    calls: dict[str, tuple[Callable[..., Tensor | None], tuple, dict]] = fold | {
        "decode": (
            lightning_attention_decode,
            (q[:3], k[:3], v[:3], log_decay, pool),
            {"slots": slots, "scale": 0.5, "batch_invariant": True, **recent},
        ),
        "prefill": (
            lightning_attention_prefill,
            (q, k, v, log_decay, pool),
            {**packed, **snapshots, "scale": 0.5, "batch_invariant": pool_of != "8 bits"},
        ),
        "verify": (lightning_attention_verify, (q, k, v, log_decay, pool), {**packed, **tree, "scale": 0.5, **after}),
        "commit": (lightning_attention_commit, (k, v, log_decay, pool), {**packed, "accepted": accepted}),
    }
    for name in ("decode", "prefill", "verify"):
        run, args, options = calls[name]
        calls[f"{name}_out"] = run, args, {**options, "out": torch.full(args[2].shape, 7.0)}
    return calls


RECENT = " recent_k recent_v recent_count state_low state_scale"
OPERATORS = {
    "decode": "slots scale batch_invariant" + RECENT,
    "prefill": "cu_seqlens slots fresh scale snapshot_at snapshot_slots batch_invariant" + RECENT,
    "verify": "cu_seqlens slots parents scale snapshots snapshot_slots" + RECENT,
    "commit": "cu_seqlens accepted slots parents" + RECENT,
    "fold": "slots" + RECENT,
}
OPERATORS |= {f"{name}_out": OPERATORS[name] for name in ("decode", "prefill", "verify")}
CALLS = [
    (name, pool_of)
    for name in OPERATORS
    for pool_of in ("floats", "rings", "8 bits")
    if (name, pool_of) != ("fold", "floats")
]


def _fold(state: Tensor | QuantizedStates, log_decay: Tensor, *, slots: Tensor, recent: RecentTokens) -> None:
    lightning_attention_fold(state, recent, log_decay, slots=slots)


@pytest.mark.parametrize(("name", "pool_of"), CALLS)
def test_opcheck_serving(name: str, pool_of: str):
    _, args, options = serving_calls(pool_of)[name]
    recent = options.pop("recent")
    if recent is not None:
        options |= {"recent_k": recent.k, "recent_v": recent.v, "recent_count": recent.count}
    for x in args:
        if isinstance(x, QuantizedStates):
            options |= {"state_low": x.low, "state_scale": x.scale}
    args = tuple(x.high if isinstance(x, QuantizedStates) else x for x in args)
    rest = (options.get(option) for option in OPERATORS[name].split())
    out = (options["out"],) if "out" in options else ()
    torch.library.opcheck(getattr(OPS, name).default, (*args, *rest, "tiled", *out))


def test_opcheck_rows_of_a_pool_in_8_bits():
    states, slots = torch.randn(3, H, D, E), torch.tensor([3, -1, 0])
    planes = torch.zeros(S, H, D, E, dtype=torch.int8), torch.zeros(S, H, D, E, dtype=torch.int8), torch.zeros(S, H, E)
    for rows in (slots, None):
        torch.library.opcheck(OPS.dequantize.default, (*planes, rows, "tiled"))
    torch.library.opcheck(OPS.quantize.default, (states, *planes, slots, "tiled"))


def _equal(got: Solution, expected: Solution):
    for field in fields(Solution):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert (a is None and b is None) or torch.equal(a, b), field.name


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("case", PROBLEMS)
def test_compiles_whole_forward_and_backward(case: str, monkeypatch: pytest.MonkeyPatch):
    problem = make_problem(H=H, D=D, E=E, **PROBLEMS[case])
    expected = solve_with(problem)
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr("tests.support.solve.lightning_attention", compiled)
    _equal(solve_with(problem), expected)


def _written(args: tuple, options: dict) -> list[Tensor]:
    """The pool and its rings."""
    state, recent = next(x for x in args if isinstance(x, QuantizedStates) or x.ndim == 4), options["recent"]
    planes = [state] if isinstance(state, Tensor) else [*vars(state).values()]
    return planes if recent is None else [*planes, recent.k, recent.v, recent.count]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("name", "pool_of"), CALLS)
def test_serving_compiles_whole(name: str, pool_of: str):
    run, args, options = serving_calls(pool_of)[name]
    _, same, same_options = serving_calls(pool_of)[name]
    expected = run(*same, **same_options)
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*args, **options)
    assert (out is None and expected is None) or torch.equal(out, expected)
    got, untouched = _written(args, options), _written(*serving_calls(pool_of)[name][1:])
    for a, b in zip(got, _written(same, same_options), strict=True):
        assert torch.equal(a, b)  # written through the compiled graph
    for name_of_written in {"out", "snapshots"} & set(options):
        assert torch.equal(options[name_of_written], same_options[name_of_written])
        assert options[name_of_written].any()
    if not name.startswith("verify"):
        assert not torch.equal(got[-1], untouched[-1])
        assert not torch.equal(got[0], untouched[0])


@pytest.mark.usefixtures("_fresh_compiler")
def test_other_lengths_do_not_compile_again(monkeypatch: pytest.MonkeyPatch):
    """Tokens, sequences and batch are sizes of the graph, not constants of it."""
    # The first sizes all differ: dynamo guards on two that are equal staying so.
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    dense = [make_problem(B=B, T=T, H=H, D=D, E=E) for B, T in ((6, 70), (3, 64), (5, 200), (2, 129))]
    packed = [
        make_problem(lengths=lengths, H=H, D=D, E=E) for lengths in ([5, 9, 0, 1, 2, 3], [1, 0, 64], [64, 65, 2, 8])
    ]
    expected = [[solve_with(p) for p in problems] for problems in (dense, packed)]
    monkeypatch.setattr("tests.support.solve.lightning_attention", compiled)
    for problems, solutions in zip((dense, packed), expected, strict=True):
        _equal(solve_with(problems[0]), solutions[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for problem, solution in zip(problems[1:], solutions[1:], strict=True):
                _equal(solve_with(problem), solution)


@pytest.mark.usefixtures("_fresh_compiler")
def test_other_batches_do_not_compile_decode_again():
    compiled = torch.compile(lightning_attention_decode, fullgraph=True, backend="aot_eager", dynamic=True)
    pool, log_decay = torch.randn(9, H, D, E), decay.alibi(H)

    def step(run: Callable[..., Tensor], state: Tensor, N: int) -> Tensor:
        torch.manual_seed(N)
        return run(torch.randn(N, H, D), torch.randn(N, H, D), torch.randn(N, H, E), log_decay, state, slots=slots[:N])

    slots, same = torch.randperm(9), pool.clone()
    step(compiled, pool, 6)
    step(lightning_attention_decode, same, 6)
    with torch.compiler.set_stance("fail_on_recompile"):
        for N in (2, 5, 9):
            assert torch.equal(step(compiled, pool, N), step(lightning_attention_decode, same, N))
    assert torch.equal(pool, same)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor():
    """A model's use of it: a projection before, a gate after, through code generation."""
    weight, log_decay = torch.randn(3 * H * D, 16), decay.alibi(H)

    def layer(x: Tensor) -> Tensor:
        q, k, v = F.silu(F.linear(x, weight)).unflatten(-1, (3, H, D)).unbind(2)
        return lightning_attention(q, k, v, log_decay).output * torch.sigmoid(v)

    x = torch.randn(2, 70, 16, requires_grad=True)
    out = torch.compile(layer, fullgraph=True)(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    expected = layer(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert relative_error(out, expected) <= 1e-6
    assert relative_error(grad, expected_grad) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_autocast_as_for_softmax_attention(dtype: torch.dtype):
    problem = make_problem(T=70, dtype=dtype)
    q, k, v, log_decay, start = arguments(problem)[:5]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, final = lightning_attention(q, k, v, log_decay, initial_state=start, output_final_state=True)
        softmax = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == softmax.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    # Only q, k and v are cast: the state and the sums inside keep their precision, to the bit.
    cast = (x.to(out.dtype) for x in (q, k, v))
    expected = lightning_attention(*cast, log_decay, initial_state=start, output_final_state=True)
    assert torch.equal(out, expected.output)
    assert torch.equal(final, expected.final_state)


def test_autocast_joins_dtypes():
    problem = make_problem(T=70)
    q, k, v, log_decay = arguments(problem)[:4]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lightning_attention(q, k.bfloat16(), v.half(), log_decay).output
        assert F.scaled_dot_product_attention(q, k.bfloat16(), v.half()).dtype == out.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="v has dtype bfloat16; it must be float32"):
        lightning_attention(q, k, v.bfloat16(), log_decay)


def test_autocast_does_not_reach_the_backward():
    """Called inside the region, as by mistake it often is."""
    problem = make_problem(T=70, dtype=torch.bfloat16)
    expected = solve_with(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = solve_with(problem)
    _equal(got, expected)


@pytest.mark.parametrize(("name", "pool_of"), CALLS)
def test_autocast_serving(name: str, pool_of: str):
    run, args, options = serving_calls(pool_of)[name]
    _, same, same_options = serving_calls(pool_of)[name]
    for given in (options, same_options):
        if "out" in given:
            given["out"] = given["out"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(*args, **options)
    tokens = next(i for i, x in enumerate(args) if not isinstance(x, Tensor) or x.ndim != 3)
    expected = run(*(x.bfloat16() for x in same[:tokens]), *same[tokens:], **same_options)
    assert (out is None and expected is None) or torch.equal(out, expected)
    assert out is None or out.dtype == torch.bfloat16
    for a, b in zip(_written(args, options), _written(same, same_options), strict=True):
        assert torch.equal(a, b)


def test_only_the_arguments_are_saved():
    q, k, v, log_decay, start, cu_seqlens, *_ = arguments(make_problem(lengths=[70, 3]), requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        lightning_attention(q, k, v, log_decay, initial_state=start, output_final_state=True, cu_seqlens=cu_seqlens)
    given = sorted(x.data_ptr() for x in (q, k, v, log_decay, start, cu_seqlens))
    assert sorted(x.data_ptr() for x in saved) == given


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(mode: Callable):
    q, k, v, log_decay, start, *_ = arguments(make_problem(T=70), requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), mode():
        out, final = lightning_attention(q, k, v, log_decay, initial_state=start, output_final_state=True)
    assert not saved
    assert not out.requires_grad
    assert out.grad_fn is None
    assert final.grad_fn is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool):
    q, k, v, log_decay, start, *_ = arguments(make_problem(T=70), requires_grad=True)
    leaves = (q, k, v, log_decay, start)

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(lightning_attention(*x[:4], initial_state=x[4], output_final_state=True))

    def grads(results: tuple[Tensor, Tensor]) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        (results[0].sin().sum() + results[1].sin().sum()).backward()
        return [leaf.grad for leaf in leaves]

    expected = grads(run(*leaves))
    for grad, want in zip(grads(checkpoint(run, *leaves, use_reentrant=reentrant)), expected, strict=True):
        assert torch.equal(grad, want)


def test_there_is_no_second_derivative():
    q, k, v, log_decay, *_ = arguments(make_problem(T=70), requires_grad=True)
    out = lightning_attention(q, k, v, log_decay).output
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="lightning_attention has no second derivative"):
        grad.sum().backward()


def test_shapes_without_data():
    """On the meta device, as for a model built before its weights are loaded."""
    q = torch.empty(2, 70, H, D, device="meta")
    v = torch.empty(2, 70, H, E, device="meta", dtype=q.dtype)
    out, final = lightning_attention(q, q, v, output_final_state=True)
    assert out.shape == (2, 70, H, E)
    assert final.shape == (2, H, D, E)
    assert out.device.type == final.device.type == "meta"
    pool = torch.empty(140, H, D, E, device="meta")
    q, v = q.flatten(0, 1), v.flatten(0, 1)
    assert lightning_attention_decode(q, q, v, None, pool).shape == (140, H, E)
