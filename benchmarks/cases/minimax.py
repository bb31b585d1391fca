"""transformers' MiniMax with its own attention and with ours: one linear layer, then a small whole model.

The layer has the size of MiniMax-Text-01 on a GPU and reads a prompt, several tokens on a state, one token on a state.
Each is timed as a whole and between the projections: the three GEMMs are the same in both, and of a long prompt the
larger part. The errors are against float64, of the same rounded weights, in the same run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.harness.errors import within
from lightning_attention import lightning_attention
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import OURS
from lightning_attention.bench.render import pivot
from lightning_attention.bench.report import Record, Report
from lightning_attention.bench.timing import Call, peak_bytes, time_calls, wall_ms
from lightning_attention.check import relative_error

if TYPE_CHECKING:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

THEIRS = "transformers"
LAYERS, LAYER = 80, 10  # of MiniMax-Text-01, and one of its linear layers
#: Relative error allowed to ours. bfloat16: q, k and v are rounded, then the output of each of four steps.
BUDGETS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Size:
    """A layer, what it reads (batch, tokens, whether there is a state), and the prompt of the whole model."""

    hidden: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    cases: tuple[tuple[str, int, int], ...]
    prompt: int
    new_tokens: int
    seconds: float


SIZES = {
    "cuda": Size(
        6144, 64, 128, torch.bfloat16,
        (("prompt", 1, 32_768), ("continuation", 1, 64), ("continuation", 1, 1024),
         ("token", 1, 1), ("token", 8, 1), ("token", 64, 1)),
        prompt=4096, new_tokens=64, seconds=0.3,
    ),
    "cpu": Size(
        256, 4, 64, torch.float32,
        (("prompt", 1, 4096), ("continuation", 1, 64), ("token", 1, 1), ("token", 8, 1)),
        prompt=128, new_tokens=16, seconds=0.2,
    ),
}  # fmt: skip


class Given(nn.Module):
    """In place of a projection: what it would compute, at no cost."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """The output of the projection that this stands for."""
        return self.output


def _config(hidden: int, heads: int, head_dim: int, layers: list[str], **more: Any) -> MiniMaxConfig:
    from transformers import MiniMaxConfig

    return MiniMaxConfig(hidden_size=hidden, num_attention_heads=heads, head_dim=head_dim, layer_types=layers,
                         num_hidden_layers=len(layers), **more)  # fmt: skip


def make_layer(size: Size, device: torch.device) -> MiniMaxLightningAttention:
    """One layer in evaluation with random weights that keep the variance, in the size's dtype, buffers too."""
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = _config(size.hidden, size.heads, size.head_dim, ["linear_attention"] * LAYERS)
    torch.manual_seed(0)
    with device:
        layer = MiniMaxLightningAttention(config, LAYER)
        for p in (layer.qkv_proj, layer.output_gate, layer.out_proj):
            nn.init.normal_(p.weight, std=p.in_features**-0.5)
    return layer.to(size.dtype).eval()


def without_projections(layer: MiniMaxLightningAttention, x: Tensor) -> MiniMaxLightningAttention:
    """The same layer for this x, its three projections done beforehand or left out."""
    part = copy.copy(layer)
    part._modules = dict(layer._modules)
    part.qkv_proj, part.output_gate = Given(layer.qkv_proj(x)), Given(layer.output_gate(x))
    part.out_proj = nn.Identity()
    return part


def in_float64(layer: MiniMaxLightningAttention, x: Tensor, state: Tensor | None) -> Tensor:
    """What the layer defines, from the weights it has: every step in float64, the attention in plain PyTorch."""
    heads, dim = layer.num_attention_heads, layer.head_dim
    x = x.double()
    qkv = torch.nn.functional.silu(x @ layer.qkv_proj.weight.double().T)
    q, k, v = qkv.unflatten(-1, (heads, 3 * dim)).split(dim, -1)
    initial = None if state is None else state.double()
    log_decay = -layer.slope_rate.flatten().double()
    out = lightning_attention(q, k, v, log_decay, initial_state=initial, backend="tiled").output.flatten(-2)
    out = out * (out.square().mean(-1, keepdim=True) + layer.norm.variance_epsilon).rsqrt() * layer.norm.weight.double()
    out = out * torch.sigmoid(x @ layer.output_gate.weight.double().T)
    return out @ layer.out_proj.weight.double().T


def cache_of(state: Tensor | None, dtype: torch.dtype) -> MiniMaxCache:
    """A cache that holds a state of its own, in the dtype that the layer keeps it in; an empty one without a state."""
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    cache = MiniMaxCache()
    if state is not None:
        cache.set_linear_cache(LAYER, state.to(dtype, copy=True))
    return cache


def _read(run: Run, layers: dict[str, MiniMaxLightningAttention], name: str, batch: int, tokens: int) -> None:
    size, device, theirs = run.scale, run.device, layers[THEIRS]
    x = torch.randn(batch, tokens, size.hidden, dtype=size.dtype, device=device)
    row = {"case": name, "B": batch, "T": tokens, "dtype": size.dtype, "hidden": size.hidden, "H": size.heads,
           "D": size.head_dim}  # fmt: skip
    state = None
    if name != "prompt":  # one that a prompt leaves, rounded so that both start from the same
        before = torch.randn(1, 512, size.hidden, dtype=size.dtype, device=device)
        state = layers[OURS](before, None, None)[1].to(size.dtype).expand(batch, -1, -1, -1)
    wanted = in_float64(theirs, x, state)
    errors: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for which, layer in layers.items():
        kept = size.dtype if which == THEIRS else torch.float32
        error = relative_error(layer(x, None, None, cache_of(state, kept))[0], wanted)
        errors[which] = within(BUDGETS[size.dtype] if which == OURS else math.inf, error)
        for part, module in (("layer", layer), ("between projections", without_projections(layer, x))):
            calls[f"{which}/{part}"] = _call(module, x, state, kept)
    del wanted
    mixed = torch.randn(batch, tokens, size.heads * size.head_dim, dtype=size.dtype, device=device)
    calls[f"{THEIRS}/projections"] = lambda: (theirs.qkv_proj(x), theirs.output_gate(x), theirs.out_proj(mixed))
    peaks = {}
    for key, call in calls.items():
        wall_ms(call, device)  # compiling, allocating
        peaks[key] = peak_bytes(call, device)
    for key, timing in time_calls(calls, device, seconds=size.seconds).items():
        which, part = key.split("/")
        record = row | {"part": part, "implementation": which} | asdict(timing) | {"peak_bytes": peaks[key]}
        run.add("minimax layer", **record, **(errors[which] if part == "layer" else {}))


def _call(layer: MiniMaxLightningAttention, x: Tensor, state: Tensor | None, dtype: torch.dtype) -> Call:
    if state is None:
        return lambda: layer(x, None, None, cache_of(None, dtype))
    cache = cache_of(state, dtype)  # every call goes on where the one before it stopped
    return lambda: layer(x, None, None, cache)


def _original_and_ours(original: nn.Module) -> dict[str, Any]:
    from lightning_attention.integrations.minimax import apply_lightning_attention

    ours = copy.deepcopy(original)
    apply_lightning_attention(ours)
    return {THEIRS: original, OURS: ours}


def measure(run: Run) -> None:
    """One linear layer on everything that the scale lists, the original and ours in turns; then the model."""
    layers = _original_and_ours(make_layer(run.scale, run.device))
    with torch.no_grad():
        for name, batch, tokens in run.scale.cases:
            _read(run, layers, name, batch, tokens)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
    del layers
    _measure_model(run)


def make_model(size: Size, device: torch.device) -> MiniMaxForCausalLM:
    """A small MiniMax in float32, 7 linear layers to 1 softmax layer, with random weights."""
    from transformers import MiniMaxForCausalLM

    config = _config(
        min(size.hidden, 1024), min(size.heads, 8), size.head_dim, ["linear_attention"] * 7 + ["full_attention"],
        vocab_size=4096, intermediate_size=512, num_key_value_heads=2, num_local_experts=4, initializer_range=0.05,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return MiniMaxForCausalLM(config).eval()


def _measure_model(run: Run) -> None:
    """Greedy text, equal or not, and tokens per second with the prompt's time apart."""
    size, models = run.scale, _original_and_ours(make_model(run.scale, run.device))
    for batch in (1, 8):
        ids = torch.randint(1, 4096, (batch, size.prompt), device=run.device)
        texts: dict[str, Tensor] = {}
        calls: dict[str, Call] = {}
        for which, model in models.items():
            texts[which] = _generate(model, ids, size.new_tokens)
            calls[which] = partial(_generate, model, ids, size.new_tokens)
            calls[f"{which}/prompt"] = partial(_generate, model, ids, 1)
        timings = time_calls(calls, run.device, seconds=size.seconds, max_repeats=5)
        equal = torch.equal(texts[THEIRS], texts[OURS])
        sizes = {"B": batch, "prompt": size.prompt, "new_tokens": size.new_tokens}
        for which in models:
            ms, prompt_ms = timings[which].ms, timings[f"{which}/prompt"].ms
            rate = batch * (size.new_tokens - 1) / max(ms - prompt_ms, 1e-3) * 1e3
            record = {"ms": ms, "prompt_ms": prompt_ms, "tokens_per_s": rate, "equal_text": equal}
            if which == OURS and not equal:
                record["error"] = "the text differs from that of the original"
            run.add("minimax model", implementation=which, **sizes, **record)


def _generate(model: MiniMaxForCausalLM, ids: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def show(report: Report) -> Iterator[Shown]:
    """A table for the layer, and one for the model."""
    keys = ("case", "part", "B", "T")
    layers = report.find("minimax layer")
    theirs = {tuple(r[key] for key in keys): r["ms"] for r in layers if r["implementation"] == THEIRS}

    def of_layer(r: Record) -> dict[str, str]:
        whose = r["implementation"]
        error = {f"{whose}\nerror": f"{r['relative_error']:.1e}"} if "relative_error" in r else {}
        ratio = {"faster": f"{theirs[tuple(r[key] for key in keys)] / r['ms']:.2f} ×"} if whose == OURS else {}
        return {f"{whose}\nms": f"{r['ms']:.4g}"} | error | ratio

    def of_model(r: Record) -> dict[str, str]:
        equal = "yes" if r["equal_text"] else "NO"
        return {"prompt ms": f"{r['prompt_ms']:.4g}", "tokens/s": f"{r['tokens_per_s']:,.0f}", "equal text": equal}

    yield from pivot("MiniMax, one linear layer", {key: key for key in keys}, layers, of_layer, words=2)
    by = {"attention": "implementation", "B": "B", "prompt": "prompt"}
    yield from pivot("MiniMax, a small model", by, report.find("minimax model"), of_model)


CASE = Case(measure, show, SIZES, needs=("transformers",))
