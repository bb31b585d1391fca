"""``torch.func``, forward-mode differentiation, tracing and exporting: right, or an error that says why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from lightning_attention import (
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_verify,
)

pytestmark = [
    # PyTorch's own: what it loads for forward mode is scripted, and linearize folds constants.
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

B, T, H, D, E, X = 1, 66, 2, 3, 2, 3
NAMES = ("q", "k", "v", "log_decay", "initial_state")
BACKENDS = ["tiled", "reference"]
Inputs = tuple[Tensor, ...]


def inputs(seed: int = 0, Hk: int = H) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, Hk, D), (B, T, Hk, D), (B, T, H, E), (H,), (B, H, D, E))
    q, k, v, rate, state = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q, k, v, -rate.abs(), state


def results(backend: str) -> Callable[..., Inputs]:
    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Inputs:
        options: dict[str, Any] = {"scale": 0.5, "output_final_state": True, "backend": backend}
        return tuple(lightning_attention(q, k, v, log_decay, initial_state=state, **options))

    return run


def loss(*tensors: Tensor) -> Tensor:
    out, final = results("tiled")(*tensors)
    return out.sin().sum() + final.cos().sum()


def moved(given: Inputs, directions: dict[int, Tensor], step: float) -> Inputs:
    return tuple(x + step * directions[i] if i in directions else x for i, x in enumerate(given))


def close(got: Any, expected: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_reverse_mode_is_backward():
    leaves = [x.requires_grad_() for x in inputs()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    close(grad(loss, argnums=(0, 1, 2, 3, 4))(*inputs()), expected)
    _, back = vjp(loss, *inputs())
    close(back(torch.tensor(1.0, dtype=torch.float64)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (4,), (0, 1, 2, 4)])
def test_forward_mode_is_a_difference_quotient(which: tuple[int, ...], backend: str):
    run, given, towards = results(backend), inputs(), inputs(1)
    directions = {i: towards[i] for i in which}
    step = 1e-6
    ends = run(*moved(given, directions, step)), run(*moved(given, directions, -step))
    expected = tuple((a - b) / (2 * step) for a, b in zip(*ends, strict=True))

    def part(*some: Tensor) -> Inputs:
        return run(*(some[which.index(i)] if i in which else x for i, x in enumerate(given)))

    points = tuple(given[i] for i in which)
    out, tangents = jvp(part, points, tuple(directions.values()))
    close(out, run(*given))
    close(tangents, expected, 1e-7)
    close(linearize(part, *points)[1](*directions.values()), expected, 1e-7)
    with forward_ad.dual_level():
        duals = part(*(forward_ad.make_dual(x, d) for x, d in zip(points, directions.values(), strict=True)))
        close(tuple(forward_ad.unpack_dual(x).tangent for x in duals), expected, 1e-7)


def test_jacobians_of_either_mode_agree():
    given = inputs()
    for i in (0, 1, 2, 4):

        def part(x: Tensor, i: int = i) -> Inputs:
            return results("tiled")(*given[:i], x, *given[i + 1 :])

        close(jacfwd(part)(given[i]), jacrev(part)(given[i]))


def test_forward_over_reverse_through_other_code():
    """The tangent of a loss may itself be differentiated backwards, where lightning_attention is linear."""
    q, k, v, rate, state = inputs()
    twice = jacrev(lambda v: jvp(lambda q: results("tiled")(q, k, v, rate, state)[0].sum(), (q,), (q,))[1])(v)
    close(twice, grad(lambda v: results("tiled")(q, k, v, rate, state * 0)[0].sum())(v))


@pytest.mark.parametrize("where", [(0, 0, 0, 0, 0), (0, None, None, None, None), (None, 2, None, 0, 1)])
@pytest.mark.parametrize("Hk", [H, 1])
def test_vmap_is_one_call_after_another(Hk: int, where: tuple[int | None, ...]):
    samples = [inputs(seed, Hk) for seed in range(X)]
    given = [samples[0][i] if dim is None else torch.stack([s[i] for s in samples], dim) for i, dim in enumerate(where)]
    each = [tuple(samples[0][i] if dim is None else s[i] for i, dim in enumerate(where)) for s in samples]
    got = vmap(results("tiled"), in_dims=where)(*given)
    close(got, tuple(torch.stack(x) for x in zip(*(results("tiled")(*e) for e in each), strict=True)))
    # Gradients of each sample, as for privacy: of what the samples share too.
    everything = (0, 1, 2, 3, 4)
    got = vmap(grad(loss, argnums=everything), in_dims=where)(*given)
    expected = [grad(loss, argnums=everything)(*e) for e in each]
    close(got, tuple(torch.stack(x) for x in zip(*expected, strict=True)))


def test_vmap_of_packed_sequences_and_of_two_levels():
    cu_seqlens, (q, k, v, rate, _) = torch.tensor([0, 20, 60]), inputs()
    many = torch.stack([q, q + 1])

    def run(q: Tensor, k: Tensor) -> Tensor:
        return lightning_attention(q, k, v, rate, cu_seqlens=cu_seqlens).output

    got = vmap(vmap(run, in_dims=(0, None)), in_dims=(None, 0))(many, torch.stack([k, k * 2]))
    close(got[1, 0], run(q, k * 2))
    close(got[0, 1], run(q + 1, k))


def test_a_batch_of_gradients_at_once():
    leaves = [x.requires_grad_() for x in inputs()]
    out, final = results("tiled")(*leaves)
    douts, dfinals = (torch.randn(X, *x.shape, dtype=x.dtype) for x in (out, final))
    for outputs, grads in (([out, final], [douts, dfinals]), ([out], [douts]), ([final], [dfinals])):
        got = torch.autograd.grad(outputs, leaves, grads, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(outputs, leaves, g, retain_graph=True) for g in zip(*grads, strict=True)]
        close(got, tuple(torch.stack(x) for x in zip(*each, strict=True)))


def test_gradients_of_each_sample_of_a_module():
    class Mixer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(6, 3 * 6, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).unflatten(-1, (3, 2, 3)).unbind(-3)
            return lightning_attention(q, k, v, -torch.ones(2)).output

    mixer, x = Mixer(), torch.randn(X, 1, 10, 6, dtype=torch.float64)
    weights = {name: p.detach() for name, p in mixer.named_parameters()}

    def of_one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(mixer, weights, (x,)).square().sum()

    each = vmap(grad(of_one), in_dims=(None, 0))(weights, x)
    for n in range(X):
        mixer.zero_grad()
        mixer(x[n]).square().sum().backward()
        close({name: g[n] for name, g in each.items()}, {name: p.grad for name, p in mixer.named_parameters()})


def refused(message: str, call: Callable[[], object], error: type[Exception] = NotImplementedError) -> None:
    with pytest.raises(error, match=message):
        call()


def test_what_there_is_not_is_refused():
    q, k, v, rate, state = inputs()
    run = results("tiled")
    refused("by log_decay", lambda: jvp(lambda r: run(q, k, v, r, state), (rate,), (rate,)))
    refused("second derivative", lambda: hessian(lambda q: loss(q, k, v, rate, state))(q))
    refused("second derivative", lambda: grad(lambda q: grad(loss)(q, k, v, rate, state).sum())(q))
    refused("second derivative", lambda: jvp(lambda q: grad(loss)(q, k, v, rate, state), (q,), (q,)))
    packed = torch.tensor([[0, 20, 60], [0, 30, 60]])
    refused(
        "cu_seqlens differs", lambda: vmap(lambda c: lightning_attention(q, k, v, rate, cu_seqlens=c).output)(packed)
    )
    operator = torch.ops.lightning_attention.attention
    refused(
        "call the function lightning_attention",
        lambda: grad(lambda q: operator(q, k, v, rate, None, None, 1.0, False, False, "tiled")[0].sum())(q),
    )


POOL = torch.zeros(1, H, D, E)
CU = {"cu_seqlens": torch.tensor([0, 1])}
SERVING: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "decode": lambda x, v: lightning_attention_decode(x, x, v, None, POOL),
    "prefill": lambda x, v: lightning_attention_prefill(x, x, v, None, POOL, **CU),
    "verify": lambda x, v: lightning_attention_verify(x, x, v, None, POOL, **CU),
    "commit": lambda x, v: lightning_attention_commit(x, v, None, POOL, accepted=torch.tensor([True]), **CU),
}


@pytest.mark.parametrize("name", SERVING)
def test_serving_has_no_derivative_and_no_vmap(name: str):
    x, v, run = torch.ones(1, H, D), torch.ones(1, H, E), SERVING[name]
    refused(f"lightning_attention_{name} has no vmap", lambda: vmap(run)(torch.stack([x, x]), torch.stack([v, v])))
    refused("tangent", lambda: jvp(run, (x, v), (x, v)), ValueError)
    refused("requires grad", lambda: grad(lambda x: run(x, v).sum())(x), ValueError)
    assert not POOL.any()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_takes_other_boundaries_and_lengths():
    def run(q: Tensor, cu_seqlens: Tensor) -> Tensor:
        return lightning_attention(q, q, q, cu_seqlens=cu_seqlens).output

    traced = torch.jit.trace(run, (torch.ones(1, 66, 1, 1), torch.tensor([0, 1, 66])), check_trace=False)
    assert traced(torch.ones(1, 66, 1, 1), torch.tensor([0, 65, 66]))[0, -2:].flatten().tolist() == [65, 1]
    assert traced(torch.ones(1, 200, 1, 1), torch.tensor([0, 150, 200]))[0, [149, 199]].flatten().tolist() == [150, 50]

    def step(x: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
        return lightning_attention_decode(x, x, x, None, pool, slots=slots)

    x, pool = torch.ones(1, 1, 1), torch.zeros(3, 1, 1, 1)
    traced = torch.jit.trace(step, (x, pool.clone(), torch.tensor([0])), check_trace=False)
    assert traced(x, pool, torch.tensor([2])).item() == 1
    assert pool.flatten().tolist() == [0, 0, 1]


class Mixer(torch.nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return lightning_attention(q, q, q).output


def test_exports_with_a_dynamic_length():
    length = torch.export.Dim("length")
    program = torch.export.export(Mixer(), (torch.ones(2, 8, 1, 1),), dynamic_shapes={"q": {1: length}})
    assert program.module()(torch.ones(2, 20, 1, 1))[:, -1].flatten().tolist() == [20, 20]


@pytest.mark.filterwarnings("ignore")
def test_onnx_names_the_operator_that_it_lacks():
    with pytest.raises(Exception, match="lightning_attention::attention"):
        torch.onnx.export(Mixer(), (torch.ones(1, 8, 1, 1),), "/dev/null", dynamo=False)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_and_sparse_tensors_are_refused(layout: torch.layout):
    x = torch.nested.nested_tensor([torch.ones(3, H, D), torch.ones(5, H, D)], layout=layout)
    message = "q is a nested tensor; pack its sequences one after another and pass cu_seqlens"
    refused(message, lambda: lightning_attention(x, x, x), TypeError)
    refused(message, lambda: lightning_attention_decode(x, x, x, None, POOL), TypeError)
    sparse = torch.ones(1, 3, H, D).to_sparse()
    refused("q has layout sparse_coo", lambda: lightning_attention(sparse, sparse, sparse), TypeError)
