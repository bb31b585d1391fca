"""Flash-linear-attention's functions: ours against float64 and, where fla is installed, against its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_attention import decay
from lightning_attention.integrations import flash_linear_attention as ours
from tests.dropins.fla_calls import (
    LAYER,
    LAYERS,
    MODULES,
    PACKED,
    RECURRENT,
    Call,
    absent,
    check,
    exactly,
    interpreted_original,
    make,
    of_the_grid,
    original,
    original_parameters,
    parameters,
    run,
    run_ours,
)
from tests.kernels.triton.support.interpreter import Interpreter, interpreted

FP32, FP16 = torch.float32, torch.float16
TOLERANCE = {FP32: 3e-6, FP16: 2e-3}
CUTS = [0, 20, 20, 57, 58]


@pytest.mark.parametrize(("name", "B", "T", "H", "K", "ratio", "scale", "normalizer"), of_the_grid(per=8))
def test_the_grid_of_flas_tests_in_small(
    name: str, B: int, T: int, H: int, K: int, ratio: int, scale: Any, normalizer: Any
):
    call = make(name, B, T, H, K, ratio, scale, normalizer)
    check(run_ours(call), exactly(call), TOLERANCE[FP32])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_packed(name: str, dtype: torch.dtype):
    for H, K, ratio, cuts in PACKED:
        call = make(name, H=H, K=K, ratio=ratio, cu_seqlens=[-(-cut // 8) for cut in cuts], dtype=dtype)
        check(run_ours(call), exactly(call), TOLERANCE[dtype])


#: What only some of the functions take: the arguments, and which do.
OPTIONS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "without states": ({"states": False}, lambda name: True),
    "reverse": ({"reverse": True}, lambda name: name in RECURRENT),
    "reverse, packed": ({"reverse": True, "cu_seqlens": CUTS}, lambda name: name in RECURRENT),
    "normalize": ({"normalize": True}, lambda name: "linear_attn" in name),
    "no normalize": ({"normalize": False}, lambda name: "linear_attn" in name),
    "normalize, reverse, packed": (
        {"normalize": True, "reverse": True, "cu_seqlens": [0, 20, 57, 58]},
        lambda name: name == "fused_recurrent_linear_attn",
    ),
    "state_v_first": ({"state_v_first": True, "ratio": 2}, lambda name: takes(name, "state_v_first")),
    "head_first": ({"head_first": True}, lambda name: takes(name, "kwargs")),
    "chunk_size": ({"chunk_size": 32}, lambda name: takes(name, "kwargs")),
}


def takes(name: str, parameter: str) -> bool:
    return parameter in [found[0] for found in parameters(ours, name)]


WITH_OPTIONS = [(name, option) for option, (_, fits) in OPTIONS.items() for name in MODULES if fits(name)]


def with_option(name: str, option: str) -> Call:
    return make(name, **OPTIONS[option][0])


@pytest.mark.parametrize(("name", "option"), WITH_OPTIONS)
def test_options(name: str, option: str):
    call = with_option(name, option)
    check(run_ours(call), exactly(call), TOLERANCE[FP32])


#: fla's chunked kernels do not run in the interpreter (they ask an int for its type); its tests hold them to these.
@interpreted
@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, option in WITH_OPTIONS
        if name in RECURRENT and option not in ("head_first", "chunk_size")
    ],
)
def test_flas_own_agrees(interpreter: Interpreter, name: str, option: str):
    absent()
    call = make(name, B=1, T=30, H=2, **OPTIONS[option][0])
    check(interpreter.call(interpreted_original, call), run_ours(call), TOLERANCE[FP32])


def _definition(module: str) -> Callable[..., Any]:
    """What fla holds its kernels to, with the arguments of a function of ours."""
    naive = getattr(original(f"{module}.naive"), f"naive_{'' if module == 'retention' else 'recurrent_'}{module}")
    if module == "simple_gla":
        return lambda q, g_gamma, **rest: naive(q, g=g_gamma.expand(q.shape[:3]), **rest)
    if module == "retention":
        return lambda q, k, v, scale: (naive(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None)
    return naive


@pytest.mark.parametrize("name", ["chunk_simple_gla", "chunk_retention", "chunk_linear_attn"])
def test_flas_definitions_agree(name: str):
    absent()
    call = make(name, states=name != "chunk_retention")
    check(run(call, _definition(MODULES[name])), run_ours(call), TOLERANCE[FP32])


@pytest.mark.parametrize("name", MODULES)
def test_the_signatures_are_flas(name: str):
    absent()
    assert parameters(ours, name) == original_parameters(name)


@pytest.mark.parametrize("name", MODULES)
def test_the_check_notices(name: str):
    call = make(name, T=140, cu_seqlens=[0, 70, 140])
    wrong = [{n: x * 1.0001} for n, x in call.tensors.items() if n not in "qk" or not call.options.get("normalize")]
    wrong += [{n: x.roll(1, 0 if n == "initial_state" else 1)} for n, x in call.tensors.items() if n != "sum_of_k"]
    for tensors in wrong:
        with pytest.raises(AssertionError):
            check(run_ours(replace(call, tensors=call.tensors | tensors)), exactly(call), TOLERANCE[FP32])


def test_the_decays_are_those_of_decay():
    q = torch.zeros(1, 1, 40, 2)
    torch.testing.assert_close(ours._retnet(q), decay.retnet(40), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours._lightning(q, LAYER, LAYERS), decay.fla_lightning(40, LAYER, LAYERS))


def test_gamma_may_be_learned():
    """In fla it has no gradient."""
    call = make("chunk_simple_gla")
    g_gamma = call.options["g_gamma"].requires_grad_()
    out, _ = ours.chunk_simple_gla(**call.tensors, g_gamma=g_gamma)
    out.square().sum().backward()
    assert g_gamma.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"])
def test_decays_of_tokens_are_refused(name: str):
    q = torch.zeros(1, 2, 1, 16)
    with pytest.raises(NotImplementedError, match=r"g is given, .* one decay per head, g_gamma \[H\]"):
        getattr(ours, name)(q, q, q, torch.zeros(1, 2, 1))


def test_other_arguments_that_are_not_served():
    q = torch.zeros(1, 2, 1, 16)
    with pytest.raises(NotImplementedError, match="no scores are computed here"):
        ours.parallel_retention(q, q, q, output_attentions=True)
    with pytest.raises(TypeError, match="head_frist is no argument"):
        ours.chunk_retention(q, q, q, head_frist=True)
    with pytest.raises(ValueError, match="the sum of k is for normalize=True"):
        ours.chunk_linear_attn(
            q, q, q, initial_state=(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 1, 16)), normalize=False
        )
    with pytest.raises(ValueError, match=r"cu_seqlens is .*; it must start at 0"):
        ours.fused_recurrent_retention(q, q, q, reverse=True, cu_seqlens=torch.tensor([0, 2, 1]))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("wrong", ["q", "k", "v", "initial_state"])
def test_an_argument_that_is_wrong_is_named(name: str, wrong: str):
    call = make(name)
    call.tensors.pop("sum_of_k", None)
    if wrong not in call.tensors:
        return
    given = call.tensors[wrong]
    for option in ("", *(x for x in ("reverse", "head_first", "state_v_first") if takes(name, x))):
        options = call.options | ({option: True} if option else {})
        with pytest.raises(TypeError, match=f"^{wrong} is a list; it must be a tensor"):
            getattr(ours, name)(**call.tensors | {wrong: [1]}, **options)
        for x in (given[0, 0, 0], given[0, 0, 0, 0]):
            with pytest.raises(ValueError, match=rf"^{wrong} has shape .*; it must be \["):
                getattr(ours, name)(**call.tensors | {wrong: x}, **options)


def test_other_arguments_that_are_wrong_are_named():
    q, state = torch.zeros(2, 4, 3, 16), torch.zeros(2, 3, 16, 16)
    for gamma in (0.5, [-0.5]):
        with pytest.raises(TypeError, match=r"^g_gamma is a .*; it must be a tensor"):
            ours.chunk_simple_gla(q, q, q, g_gamma=gamma)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(TypeError, match=rf"^g_gamma has dtype {name}; it must be of floating point"):
            ours.chunk_simple_gla(q, q, q, g_gamma=torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=r"^num_layers is 0; it must be at least 1"):
        ours.chunk_lightning_attn(q, q, q, 0, 0)
    with pytest.raises(TypeError, match=r"^layer_idx is a str; it must be an integer"):
        ours.fused_recurrent_lightning_attn(q, q, q, "1", 2)
    for layer, wanted in ((-1, "at least 0"), (4, "at most 3")):
        with pytest.raises(ValueError, match=rf"^layer_idx is {layer}; it must be {wanted}"):
            ours.chunk_lightning_attn(*torch.randn(3, 1, 8, 2, 16), layer, 4)
    with pytest.raises(ValueError, match=r"^initial_state is a tuple of 3; it must be"):
        ours.chunk_linear_attn(q, q, q, initial_state=(state, state, state))
    with pytest.raises(TypeError, match=r"^initial_state\[1\] is a list; it must be a tensor"):
        ours.chunk_linear_attn(q, q, q, initial_state=(state, [1]))
    for shape in ((2, 3, 16), (2, 3, 3, 16), (16,), (1, 1, 3, 16)):
        with pytest.raises(ValueError, match=r"^initial_state\[1\] has shape .* \[N, 1, H, K\] = \[2, 1, 3, 16\]"):
            ours.chunk_linear_attn(q, q, q, initial_state=(state, torch.zeros(shape)))
    for length in (2, 6):
        with pytest.raises(ValueError, match=rf"^k has shape \[2, {length}, 3, 16\]; it must be that of q"):
            ours.fused_recurrent_retention(q, torch.zeros(2, length, 3, 16), q, reverse=True)


@pytest.mark.parametrize("name", ["chunk_retention", "parallel_retention", "fused_recurrent_lightning_attn"])
def test_fewer_heads_of_q_and_k(name: str):
    """The decays are those of v's heads."""
    q, k, v = torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 4, 8)
    more = {"layer_idx": 1, "num_layers": 3} if "lightning" in name else {}
    whole = [x.repeat_interleave(2, 2) for x in (q, k)]
    found = getattr(ours, name)(q, k, v, **more)[0]
    assert torch.allclose(found, getattr(ours, name)(*whole, v, **more)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["fused_recurrent_simple_gla", "fused_recurrent_retention"])
def test_the_former_name_of_state_v_first(name: str):
    call = make(name, ratio=2)
    function, start = getattr(ours, name), call.tensors.pop("initial_state").mT
    options = call.options | {"initial_state": start}
    with pytest.warns(DeprecationWarning, match="now called state_v_first"):
        _, former = function(**call.tensors, **options, transpose_state_layout=True)
    assert torch.equal(former, function(**call.tensors, **options, state_v_first=True)[1])
    with pytest.raises(ValueError, match="both given"):
        function(**call.tensors, **options, state_v_first=True, transpose_state_layout=True)


def test_a_normalised_call_is_taken_up_where_it_ended():
    call = make("chunk_linear_attn", states=False)
    q, k, v = (call.tensors[n] for n in "qkv")
    whole, _ = ours.chunk_linear_attn(q, k, v)
    first, state = ours.chunk_linear_attn(q[:, :40], k[:, :40], v[:, :40], output_final_state=True)
    rest, (final, _) = ours.chunk_linear_attn(q[:, 40:], k[:, 40:], v[:, 40:], initial_state=state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-5, atol=1e-5)
    assert final is None


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_keys_that_sum_to_zero_are_not_divided_by(dtype: torch.dtype):
    """Those of padding: 1e-10 is 0 in float16."""
    q, k, v = torch.rand(3, 1, 8, 2, 16).to(dtype)
    k[:, :3] = 0
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, _ = ours.chunk_linear_attn(q, k, v)
    assert out.dtype == dtype
    assert not out[:, :3].any()
    for x in (out, *torch.autograd.grad(out[:, 3:].sum(), (q, k, v))):
        assert x.isfinite().all()


def test_strides_and_compilation():
    """Rows that are not dense are copied, as in fla; a call compiles as one graph."""
    q, k, v = (torch.randn(2, 3, 8, 50).transpose(1, 3).transpose(2, 3) for _ in range(3))
    assert q.stride(-1) != 1
    out, _ = ours.chunk_retention(q, k, v)
    torch.testing.assert_close(out, ours.chunk_retention(*(x.contiguous() for x in (q, k, v)))[0])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v):
        a, _ = ours.fused_recurrent_retention(q, k, v, reverse=True)
        b, _ = ours.chunk_lightning_attn(q, k, v, 0, 4)
        c, _ = ours.chunk_linear_attn(q.exp(), k.exp(), v)
        return a + b + c

    torch.testing.assert_close(
        compiled(q, k, v),
        ours.fused_recurrent_retention(q, k, v, reverse=True)[0]
        + ours.chunk_lightning_attn(q, k, v, 0, 4)[0]
        + ours.chunk_linear_attn(q.exp(), k.exp(), v)[0],
    )


def test_what_is_divided_may_be_larger_than_float16():
    call = make("chunk_linear_attn", T=200, K=64, scale=1.0, dtype=FP16)
    call.tensors["q"].mul_(30)
    assert (call.tensors["q"].double() * call.tensors["k"].double().cumsum(1)).sum(-1).max() > torch.finfo(FP16).max
    got = run_ours(call)
    assert got["output"].dtype == FP16
    check(got, exactly(call), TOLERANCE[FP16])


@pytest.mark.parametrize("given", [FP32, FP16])
def test_what_is_divided_may_be_larger_under_autocast_too(given: torch.dtype):
    q, k, v = (50 * torch.rand(3, 1, 200, 2, 64)).to(FP16)
    expected, state = ours.chunk_linear_attn(q, k, v, output_final_state=True)
    with torch.autocast("cpu", FP16):
        out, final = ours.chunk_linear_attn(*(x.to(given) for x in (q, k, v)), output_final_state=True)
    assert expected.isfinite().all()
    torch.testing.assert_close((out, final), (expected, state), rtol=0, atol=0)
