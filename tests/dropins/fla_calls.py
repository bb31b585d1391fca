"""Calls of flash-linear-attention's functions: ours, fla's own where it is installed, and what is right, in float64."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attention import lightning_attention
from lightning_attention.integrations import flash_linear_attention as ours
from tests.support import relative_error

#: Where each function is in fla.
MODULES = {
    "chunk_simple_gla": "simple_gla",
    "fused_chunk_simple_gla": "simple_gla",
    "fused_recurrent_simple_gla": "simple_gla",
    "chunk_lightning_attn": "lightning_attn",
    "fused_recurrent_lightning_attn": "lightning_attn",
    "chunk_retention": "retention",
    "fused_chunk_retention": "retention",
    "parallel_retention": "retention",
    "fused_recurrent_retention": "retention",
    "chunk_linear_attn": "linear_attn",
    "fused_chunk_linear_attn": "linear_attn",
    "fused_recurrent_linear_attn": "linear_attn",
}
RECURRENT = [name for name in MODULES if name.startswith("fused_recurrent")]
STATELESS = "parallel_retention"
LAYER, LAYERS = 3, 12

#: The sizes of fla's own tests. B, T, H, K, V / K, scale, what logarithms of decays are divided by:
SIMPLE_GLA = [
    (1, 63, 1, 64, 1, 1.0, 1.0),
    (2, 500, 3, 60, 1, 1.0, 1.0),
    (1, 1000, 4, 128, 1, 1.0, 0.1),
    (2, 1000, 4, 128, 1, 0.1, 1.0),
    (3, 1000, 4, 128, 1, 0.1, 10.0),
    (4, 2048, 8, 64, 1, 0.1, 1.0),
]
RETENTION = [
    (1, 63, 1, 64, 1, None, None),
    (2, 500, 3, 60, 1, None, None),
    (2, 1000, 3, 100, 1, None, None),
    (2, 1000, 3, 128, 2, None, None),
    (3, 1024, 4, 256, 2, None, None),
    (4, 2048, 4, 64, 2, None, None),
]
LINEAR = [
    (1, 63, 1, 64, 1, None, None),
    (2, 500, 3, 60, 1, None, None),
    (3, 1024, 8, 128, 1, 1.0, None),
    (3, 1024, 8, 128, 1, 0.1, None),
    (2, 2048, 4, 256, 1, None, None),
]
GRID = {"simple_gla": SIMPLE_GLA, "lightning_attn": SIMPLE_GLA, "retention": RETENTION, "linear_attn": LINEAR}
#: H, K, V / K, cu_seqlens
PACKED = [
    (4, 64, 1, [0, 15]),
    (4, 64, 2, [0, 256, 500, 1000]),
    (4, 100, 2, [0, 15, 100, 300, 1200, 2000]),
    (4, 64, 1, [0, 1, 100, 300, 1200, 2048]),
]


def of_the_grid(per: int = 1) -> list[Any]:
    """Every function with the sizes of fla's tests, T and B · H divided by ``per``."""
    return [
        pytest.param(name, *sizes, id=f"{name}-{'-'.join(map(str, sizes))}")
        for name, module in MODULES.items()
        for B, T, H, *rest in GRID[module]
        for sizes in [(-(-B // per), -(-T // per), -(-H // per), *rest)]
    ]


@dataclass(frozen=True)
class Call:
    """A function's name, its tensors, its other arguments, and the decays that it is to have."""

    name: str
    tensors: dict[str, Tensor]
    log_decay: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)


def make(
    name: str, B: int = 2, T: int = 70, H: int = 3, K: int = 16, ratio: int = 1, scale: float | None = None,
    normalizer: float | None = 1.0, *, dtype: torch.dtype = torch.float32, cu_seqlens: Sequence[int] | None = None,
    states: bool = True, **options: Any,
) -> Call:  # fmt: skip
    """Random normal inputs, of which those that are divided by a sum are positive; decays as in fla's tests."""
    module, V = MODULES[name], K * ratio
    if cu_seqlens is not None:
        B, T, N = 1, cu_seqlens[-1], len(cu_seqlens) - 1
        options["cu_seqlens"] = torch.tensor(cu_seqlens)
    else:
        N = B
    normalize = options.get("normalize", module == "linear_attn" and name != "fused_recurrent_linear_attn")
    if module == "linear_attn":
        options["normalize"] = normalize
    tensors = {"q": torch.randn(B, T, H, K), "k": torch.randn(B, T, H, K), "v": torch.randn(B, T, H, V)}
    if normalize:
        tensors |= {n: tensors[n].abs() + 0.01 for n in ("q", "k")}
    tensors = {n: x.to(dtype) for n, x in tensors.items()}
    if states and name != STATELESS:
        tensors["initial_state"] = torch.randn(N, H, K, V)
        options["output_final_state"] = True
        if normalize:
            tensors["sum_of_k"] = torch.rand(N, 1, H, K)
    log_decay = None
    head = torch.arange(H)
    if module == "simple_gla":
        log_decay = options["g_gamma"] = F.logsigmoid(torch.randn(H)) / (normalizer or 1.0)
    elif module == "retention":
        log_decay = torch.log1p(-(2.0 ** (-5 - head.double())))
    elif module == "lightning_attn":
        log_decay = -8 / H * (1 - LAYER / LAYERS) * head.double()
        options |= {"layer_idx": LAYER, "num_layers": LAYERS}
    return Call(name, tensors, log_decay, {"scale": scale} | options)


def moved(call: Call, device: str) -> Call:
    options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in call.options.items()}
    log_decay = None if call.log_decay is None else call.log_decay.to(device)
    return Call(call.name, {n: x.to(device) for n, x in call.tensors.items()}, log_decay, options)


Result = dict[str, Tensor]


def run(call: Call, function: Callable[..., Any]) -> Result:
    """Outputs, final states and gradients, all of [B, T, H, ...] and [N, H, K, V]."""
    leaves = {name: x.clone().requires_grad_() for name, x in call.tensors.items()}
    given = {name: leaves[name] for name in ("q", "k", "v")}
    if call.options.get("head_first"):
        given = {name: x.transpose(1, 2) for name, x in given.items()}
    if "initial_state" in leaves:
        start = leaves["initial_state"]
        start = start.mT if call.options.get("state_v_first") else start
        given["initial_state"] = (start, leaves["sum_of_k"]) if "sum_of_k" in leaves else start
    out, final = function(**given, **call.options)
    if call.options.get("head_first"):
        out = out.transpose(1, 2)
    results = {"output": out}
    if final is not None:
        state, *rest = final if isinstance(final, tuple) else (final,)
        if state is not None:
            results["final_state"] = state.mT if call.options.get("state_v_first") else state
        if rest:
            results["final_sum_of_k"] = rest[0]
    return _differentiated(results, leaves)


def run_ours(call: Call) -> Result:
    return run(call, getattr(ours, call.name))


def run_original(call: Call) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(call, getattr(original(MODULES[call.name]), call.name))


def first_original(call: Call) -> Result:
    """On a GPU, with the first of each kernel's tile sizes: to find the fastest takes fla minutes."""
    from triton.runtime.autotuner import Autotuner

    with patch.object(Autotuner, "prune_configs", lambda self, _: self.configs[:1]):
        return run_original(call)


@contextmanager
def interpreting_fla() -> Iterator[None]:
    """What fla wants of Triton's interpreter: of several tile sizes it takes the first, for nothing can be timed."""
    from triton.runtime.autotuner import Autotuner

    torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings(), patch.object(Autotuner, "_bench", lambda *_, **__: [1.0, 1.0, 1.0]):
        warnings.simplefilter("ignore")
        yield


def interpreted_original(call: Call) -> Result:
    with interpreting_fla():
        return run_original(call)


def original(module: str) -> ModuleType:
    """fla.ops.<module>, which warns when it is imported without a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"fla.ops.{module}")


def absent() -> None:
    if find_spec("fla") is None or find_spec("einops") is None:
        pytest.skip("flash-linear-attention is not installed (fla, and einops, which it imports)")


def parameters(module: ModuleType, name: str) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(getattr(module, name)).parameters.values()
    return [(x.name, x.kind, x.default) for x in found]


def original_parameters(name: str) -> list[tuple[str, Any, Any]]:
    return parameters(original(MODULES[name]), name)


def exactly(call: Call) -> Result:
    """The definition, every weight written out, in float64."""
    leaves = {name: x.double().requires_grad_() for name, x in call.tensors.items()}
    options = call.options
    q, k, v = (leaves[name] for name in ("q", "k", "v"))
    (B, T, H, K), V = q.shape, v.shape[3]
    cuts = options["cu_seqlens"].tolist() if "cu_seqlens" in options else [0, T]
    sequences = [(b, slice(*bounds)) for b in range(B) for bounds in pairwise(cuts)]
    rate = torch.zeros(H).double() if call.log_decay is None else call.log_decay.double()
    scale = K**-0.5 if options["scale"] is None else options["scale"]
    outputs, finals, sums = [], [], []
    for n, (b, tokens) in enumerate(sequences):
        turn = (lambda x: x.flip(0)) if options.get("reverse") else (lambda x: x)
        queries, keys, values = (turn(x[b, tokens]) for x in (q, k, v))
        start = leaves["initial_state"][n] if "initial_state" in leaves else q.new_zeros(H, K, V)
        age = torch.arange(len(queries)).double()
        weight = ((age[:, None] - age).clamp(min=0) * rate[:, None, None]).exp().tril()
        scores = torch.einsum("thk,shk->hts", queries, keys) * weight
        faded = ((age[:, None] + 1) * rate).exp()
        out = scale * (
            torch.einsum("hts,shv->thv", scores, values)
            + faded[..., None] * torch.einsum("thk,hkv->thv", queries, start)
        )
        left = ((len(queries) - 1 - age[:, None]) * rate).exp()
        finals.append(
            (len(queries) * rate).exp()[:, None, None] * start + torch.einsum("th,thk,thv->hkv", left, keys, values)
        )
        if options.get("normalize"):
            total = keys.cumsum(0) + (leaves["sum_of_k"][n] if "sum_of_k" in leaves else 0)
            out = out / (scale * (queries * total).sum(-1, keepdim=True) + 1e-10)
            sums.append(total[-1:])
        outputs.append(turn(out))
    results = {"output": torch.cat(outputs) if "cu_seqlens" in options else torch.stack(outputs)}
    results["output"] = results["output"].view(v.shape)
    if options.get("output_final_state"):
        results["final_state"] = torch.stack(finals)
    if options.get("normalize"):
        results["final_sum_of_k"] = torch.stack(sums)
    return _differentiated(results, leaves)


def in_float64(call: Call) -> Result:
    """The operation in float64, for sizes whose weights cannot be written out."""
    tensors = {name: x.double() for name, x in call.tensors.items()}

    def function(q: Tensor, k: Tensor, v: Tensor, initial_state: Any = None, **options: Any) -> Any:
        sums = None
        if isinstance(initial_state, tuple):
            initial_state, sums = initial_state
        scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
        log_decay = None if call.log_decay is None else call.log_decay.double()
        given = {"cu_seqlens": options.get("cu_seqlens"), "output_final_state": True, "backend": "tiled"}
        out, final = lightning_attention(q, k, v, log_decay, scale=scale, initial_state=initial_state, **given)
        final = final if options.get("output_final_state") else None
        if not options.get("normalize"):
            return out, final
        start = None if sums is None else sums.squeeze(1)[..., None]
        total, sums = lightning_attention(
            q, k, torch.ones_like(v[..., :1]), None, scale=scale, initial_state=start, **given
        )
        return out / (total + 1e-10), (final, sums.squeeze(-1)[:, None])

    return run(Call(call.name, tensors, call.log_decay, call.options), function)


def _differentiated(results: Result, leaves: Result) -> Result:
    """With the gradients of a sum of the results, weighted by numbers that are the same for every way to them."""
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(results.values())]
    given = [w.to(x) for w, x in zip(weights, results.values(), strict=True)]
    grads = torch.autograd.grad([*results.values()], [*leaves.values()], given)
    return {n: x.detach().cpu() for n, x in results.items()} | {
        f"gradient of {n}": x.cpu() for n, x in zip(leaves, grads, strict=True)
    }


def check(got: Result, wanted: Result, tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    wrong = errors(got, wanted, tolerance)
    assert not wrong, wrong


def errors(got: Result, wanted: Result, tolerance: float) -> dict[str, float]:
    """Those that are larger, NaN too."""
    return {n: e for n in wanted if not (e := relative_error(got[n], wanted[n])) <= tolerance}
