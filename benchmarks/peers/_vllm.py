"""Functions of vLLM's wheel, each taken from its file by name: the package wants hundreds of others to be imported."""

import ast
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LAYERS = "model_executor/layers"
KERNELS = (
    "_fwd_diag_kernel", "_fwd_kv_parallel", "_fwd_kv_reduce", "_fwd_none_diag_kernel", "_attention",
    "lightning_attention_", "lightning_attention", "_linear_attn_decode_kernel", "linear_decode_forward_triton",
)  # fmt: skip
SHARED = ("clear_linear_attention_cache_for_new_sequences", "linear_attention_prefill_and_mix")
MINIMAX = (*SHARED, "linear_attention_decode", "MiniMaxText01LinearKernel")
BAILING = (*SHARED, "_bailing_linear_attn_decode_spec_step_kernel", "bailing_linear_attention_decode_spec")


@cache
def vllm() -> SimpleNamespace:
    """Its functions: ``kernels``, ``minimax`` and ``bailing``, by file.

    Raises:
        ModuleNotFoundError: vLLM is not installed, or has none of these files.
        ImportError: a file has no such function.
    """
    import triton
    import triton.language as tl

    given = {
        "torch": torch, "triton": triton, "tl": tl, "Callable": Callable, "PAD_SLOT_ID": -1, "rearrange": _rearrange,
        "current_platform": SimpleNamespace(is_cuda=torch.cuda.is_available), "LinearAttentionMetadata": object,
    }  # fmt: skip
    kernels = _taken("lightning_attn.py", KERNELS, given)
    minimax = _taken("mamba/linear/minimax_linear_attn.py", MINIMAX, given | vars(kernels))
    bailing = _taken("mamba/linear/bailing_linear_attn.py", BAILING, given)
    return SimpleNamespace(kernels=kernels, minimax=minimax, bailing=bailing)


def _taken(file: str, names: tuple[str, ...], given: dict[str, Any]) -> SimpleNamespace:
    """What a file defines under these names, where ``given`` stands for what it imports."""
    spec = find_spec("vllm")
    places = [] if spec is None else [Path(x) for x in spec.submodule_search_locations or ()]
    path = next((p for place in places if (p := place / LAYERS / file).exists()), None)
    if path is None:
        raise ModuleNotFoundError(f"vllm is not installed, or has no {LAYERS}/{file}")
    module = ast.parse(path.read_text(encoding="utf-8"))
    module.body = [x for x in module.body if set(_defined(x)) & set(names)]
    scope = given | {"__name__": f"_vllm_{path.stem}"}
    exec(compile(module, str(path), "exec"), scope)
    missing = [name for name in names if name not in scope]
    if missing:
        raise ImportError(f"{path.name} of vllm has no {', '.join(missing)}; this version of it is not known")
    return SimpleNamespace(**{name: scope[name] for name in names})


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [x.id for x in statement.targets if isinstance(x, ast.Name)]
    return []


def _rearrange(x: torch.Tensor, pattern: str) -> torch.Tensor:
    """The two patterns of ``einops.rearrange`` that are asked for."""
    if pattern == "b h n d -> b n (h d)":
        return x.transpose(1, 2).flatten(2)
    assert pattern == "h n d -> n (h d)"
    return x.transpose(0, 1).flatten(1)
