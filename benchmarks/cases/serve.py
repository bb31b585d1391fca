"""Generation: tokens per second against batch size and context, beside a softmax model of the same size."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.timing import captured
from lightning_attention.bench.case import Case, Run, Shown
from lightning_attention.bench.peers import OUR_MODEL
from lightning_attention.bench.render import Figure, Line, Panel, Table, caption, length, lines, pivot
from lightning_attention.bench.report import Record, Report
from lightning_attention.bench.timing import Timing, synchronize, wall_ms

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from lightning_attention.models.transnormer import TransnormerForCausalLM

SUITE, OURS, RINGS, SOFTMAX = "serve", OUR_MODEL, f"{OUR_MODEL}:rings", "llama"
LABELS = {OURS: "TransNormerLLM", RINGS: "TransNormerLLM, rings", SOFTMAX: "softmax (Llama)"}
R = 16  # tokens that its rings hold
FIRST_ID = 3  # the ids before it are special tokens
_ATTENTION = "whole_static_cache"
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Scale:
    """What to measure: every batch size at the first context, and each of ``contexts``' batch sizes at its contexts.

    With rings only the first context: what a step takes does not depend on it.

    ``model`` holds what differs from the 385M of the releases. ``prefill_tokens`` is the same for every context, and
    no more than the shortest: else the peak of memory would be that of longer pieces, not of a longer context.
    """

    batches: tuple[int, ...]
    contexts: dict[int, tuple[int, ...]]
    prefill_tokens: int
    dtype: torch.dtype
    model: dict[str, int] = field(default_factory=dict)
    steps: int = 40
    windows: int = 5

    def pairs(self, implementation: str) -> list[tuple[int, int]]:
        """Batch size and context of each measurement."""
        first = min(min(contexts) for contexts in self.contexts.values())
        found = {(B, first) for B in self.batches}
        if implementation != RINGS:
            found |= {(B, T) for B, Ts in self.contexts.items() for T in Ts}
        return sorted(found)


_K = 1024
_SMALL = {"decoder_layers": 4, "decoder_embed_dim": 256, "decoder_attention_heads": 4, "glu_dim": 704}
SCALES = {
    "cuda": Scale(
        (1, 4, 16, 64, 256),
        {1: (_K, 4 * _K, 16 * _K, 64 * _K, 256 * _K, _K * _K), 16: (_K, 4 * _K, 16 * _K, 64 * _K)},
        _K,
        torch.bfloat16,
    ),
    "cuda quick": Scale((1, 16, 256), {1: (_K, 64 * _K)}, _K, torch.bfloat16, windows=3),
    "cpu": Scale((1, 4, 16), {1: (256, _K, 4 * _K, 16 * _K)}, 256, torch.float32, _SMALL | {"vocab_size": 4096}, 20, 3),
    "cpu quick": Scale((1, 4), {1: (256, 8 * _K)}, 256, torch.float32, _SMALL | {"vocab_size": 4096}, 10, 3),
}


def measure(run: Run) -> None:
    """Decode steps of both models at every batch size and context of the scale, as records of the suite ``serve``.

    Ours is what ``lightning-attention generate --prompts`` runs: :class:`ContinuousBatch`, which has read prompts of
    that many random tokens, with all its scheduling; without rings of recent tokens, and with. The softmax model is
    transformers' Llama with as many weights and a static cache full of random numbers of exactly the context's length,
    which its attention reads without a mask by the fastest of PyTorch's kernels for the shape; on a GPU it replays one
    CUDA graph, with no scheduling at all. All have random weights, take the likeliest token, and fetch every step's
    tokens, on a GPU one step behind.

    For each: ``ms`` a step (median of some windows of steps, by the clock), ``min_ms``, ``max_ms``,
    ``tokens_per_second``, ``state_bytes`` (what it keeps of the context) and, on a GPU, ``peak_bytes`` (of reading the
    prompt and generating, weights included; of the softmax model only of generating).
    """
    scale, device = run.scale, run.device
    for name, (build, generation) in _MODELS.items():
        pairs = [x for x in scale.pairs(name) if run.only is None or _name(name, *x) in run.only]
        if not pairs:
            continue
        torch.manual_seed(0)
        with device:
            model = build(scale).to(scale.dtype).eval()
        parameters = sum(p.numel() for p in model.parameters())
        _measure(generation, model, 1, scale.prefill_tokens, scale, device)  # compiled and warm
        about = {"implementation": name, "label": LABELS[name], "parameters": parameters}
        for B, context in pairs:
            try:
                result = _measure(generation, model, B, context, scale, device)
            except torch.OutOfMemoryError as error:
                result = {"skipped": str(error).partition("\n")[0]}
            run.add(SUITE, **about, B=B, context=context, dtype=scale.dtype, **result)
        del model
        _clean(device)


def _name(implementation: str, B: int, context: int) -> str:
    return f"{implementation}, batch {B}, context {context}"


def rows(scale: Scale) -> Iterator[str]:
    """Each model at its batch sizes and contexts."""
    yield from (_name(name, *pair) for name in LABELS for pair in scale.pairs(name))


def _transnormer(scale: Scale) -> TransnormerForCausalLM:
    from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM

    return TransnormerForCausalLM(TransnormerConfig.from_name("385M", **scale.model))


def _llama(scale: Scale) -> LlamaForCausalLM:
    """A Llama with our layers, width, heads and vocabulary, its MLP widened to have as many weights in all."""
    from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

    from lightning_attention.models.transnormer import TransnormerConfig

    ours = TransnormerConfig.from_name("385M", **scale.model)
    width = ours.decoder_embed_dim
    # Five projections of ours, with the gate's, against four; both have three in the MLP.
    intermediate = 32 * round((ours.glu_dim + width / 3) / 32)
    AttentionInterface.register(_ATTENTION, _attend)  # for a name without a mask of its own transformers makes none
    config = LlamaConfig(
        vocab_size=ours.vocab_size, hidden_size=width, num_hidden_layers=ours.decoder_layers,
        num_attention_heads=ours.decoder_attention_heads, intermediate_size=intermediate,
        max_position_embeddings=1 << 21,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=_ATTENTION)


def _attend(
    module: torch.nn.Module,  # noqa: ARG001 (transformers gives it)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[B, H, 1, D] queries over whole caches, [B, H, context, D]."""
    assert attention_mask is None  # a mask would keep PyTorch from its fastest kernels
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


def _free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


Step = Callable[[], object]


def _measure(
    generation: Callable[..., Any], model: Any, B: int, context: int, scale: Scale, device: torch.device
) -> dict[str, Any]:
    """Time and memory of decode steps; ``generation`` gives a step and the bytes kept of the context."""
    _clean(device)
    with torch.inference_mode(), generation(model, B, context, scale, device) as (step, state_bytes, notes):
        for _ in range(3):  # captured, and the first tokens fetched
            step()
        window = lambda: [step() for _ in range(scale.steps)]  # noqa: E731
        timing = Timing.of([wall_ms(window, device) / scale.steps for _ in range(scale.windows)])
    memory = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    rate = {"tokens_per_second": B * 1e3 / timing.ms}
    return asdict(timing) | rate | {"state_bytes": state_bytes} | memory | notes


@contextmanager
def _generate(
    model: TransnormerForCausalLM, B: int, context: int, scale: Scale, device: torch.device, *, recent_tokens: int
) -> Iterator[tuple[Step, int, dict[str, Any]]]:
    """A running batch that has read a prompt of ``context`` random tokens for each of B requests."""
    from lightning_attention.serving import ContinuousBatch, Request

    batch = ContinuousBatch(model, max_batch=B, prefill_tokens=scale.prefill_tokens, recent_tokens=recent_tokens)
    random = torch.Generator().manual_seed(context)
    for _ in range(B):
        prompt = torch.randint(FIRST_ID, model.config.vocab_size, (context,), generator=random, device="cpu")
        batch.submit(Request(prompt.tolist(), max_tokens=1 << 40))
    started: set[int] = set()
    start = time.perf_counter()
    while len(started) < B:
        started.update(token.request for token in batch.step())
    synchronize(device)
    seconds = time.perf_counter() - start
    rings = [x for ring in batch.recent if ring is not None for x in (ring.k, ring.v, ring.count)]
    kept = sum(x.nbytes for x in (*batch.states, *rings))
    yield batch.step, kept, {"prompt_seconds": seconds, "recent_tokens": recent_tokens}


@contextmanager
def _generate_softmax(
    model: LlamaForCausalLM, B: int, context: int, scale: Scale, device: torch.device
) -> Iterator[tuple[Step, int, dict[str, Any]]]:
    """Decode steps at the last place of a full cache, again and again."""
    from transformers import StaticCache

    from lightning_attention.models.arguments import CACHE

    config = model.config
    heads, head_dim = config.num_key_value_heads, config.head_dim
    needed = 2 * B * context * config.num_hidden_layers * heads * head_dim * scale.dtype.itemsize
    if needed > _free_bytes(device):
        free = f"{_free_bytes(device) / 1e9:.1f} GB of memory"
        raise torch.OutOfMemoryError(f"a cache of {needed / 1e9:.1f} GB in {free}")
    cache = StaticCache(config, max_cache_len=context)
    cache.early_initialization(B, heads, head_dim, scale.dtype, device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    ids = torch.full((B, 1), FIRST_ID, device=device)
    position = torch.full((1, 1), context - 1, device=device)

    def decode() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context - 1)
        logits = model(input_ids=ids, position_ids=position, **{CACHE: cache}, use_cache=True).logits
        ids.copy_(logits[:, -1].float().argmax(-1, keepdim=True))

    backend, chosen = _fastest_attention(cache.layers[0], device)
    with chosen:
        step = _replayed(decode, ids) if device.type == "cuda" else decode
    yield step, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), {"attention": backend}


def _fastest_attention(layer: Any, device: torch.device) -> tuple[str, Any]:
    """The name of, and the context that asks for, PyTorch's fastest attention of one query over the layer's cache."""
    if device.type != "cuda":
        return "default", nullcontext()
    query = layer.keys[:, :, :1].clone()
    times: dict[SDPBackend, float] = {}
    for backend in _BACKENDS:
        try:
            with sdpa_kernel(backend):  # 20 at a time: one is shorter than its launch
                replay = captured(
                    lambda: [F.scaled_dot_product_attention(query, layer.keys, layer.values) for _ in range(20)], device
                )
        except RuntimeError:  # this GPU or this build has it not
            continue
        replay()
        times[backend] = min(wall_ms(replay, device) for _ in range(3))
    fastest = min(times, key=lambda backend: times[backend])
    return fastest.name.lower(), sdpa_kernel(fastest)


_MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    OURS: (_transnormer, partial(_generate, recent_tokens=0)),
    RINGS: (_transnormer, partial(_generate, recent_tokens=R)),
    SOFTMAX: (_llama, _generate_softmax),
}


def _replayed(decode: Callable[[], None], ids: Tensor) -> Step:
    """The step captured in a CUDA graph; a call starts one and fetches the tokens of the one before."""
    replay = captured(decode, ids.device)
    fetched: list[tuple[Tensor, torch.cuda.Event]] = []

    def step() -> None:
        replay()
        tokens, landed = ids.to("cpu", non_blocking=True), torch.cuda.Event()
        landed.record()
        fetched.append((tokens, landed))
        if len(fetched) > 1:
            tokens, landed = fetched.pop(0)
            landed.synchronize()
            tokens.tolist()

    return step


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def table(records: list[Record]) -> Iterator[Table]:
    """One row a batch size and context, the models beside each other."""

    def cells(r: Record) -> dict[str, str]:
        found = ["", "", "no room"]
        if "ms" in r:
            found = [f"{r['ms']:.3f}", f"{r['tokens_per_second']:,.0f}", f"{r['state_bytes'] / 1e6:,.1f} MB"]
        heads = (f"{r['label']}\n{column}" for column in ("ms", "tokens/s", "keeps"))
        return dict(zip(heads, found, strict=True))

    return pivot("generation, decode steps", {"batch": "B", "context": lambda r: length(r["context"])}, records, cells,
                 words=0)  # fmt: skip


def constant(records: list[Record]) -> list[str]:
    """For every batch size that we ran at several contexts: how much time and memory change between them."""
    lines = []
    for B in sorted({r["B"] for r in records}):
        ours = sorted((r for r in records if (r["implementation"], r["B"]) == (OURS, B)), key=lambda r: r["context"])
        if len(ours) < 2:
            continue
        first, last = (f"{r['ms']:.3f} ms at context {length(r['context'])}" for r in (ours[0], ours[-1]))
        line = f"batch {B}: a step takes {first} and {last}"
        for what, name in (("ms", "the time differs"), ("peak_bytes", "the peak of memory")):
            values = [r[what] for r in ours if what in r]
            line += f"; over all contexts {name} by {max(values) / min(values) - 1:.1%}" if values else ""
        lines.append(line)
    return lines


def figure(records: list[Record], environment: dict[str, Any]) -> Figure:
    """Tokens per second against the batch size, and time of a step against the context."""
    drawn = sorted((r for r in records if "ms" in r), key=lambda r: (r["B"], r["context"]))
    shortest = min(r["context"] for r in drawn)
    batches = lines((r for r in drawn if r["context"] == shortest), "B", "tokens_per_second")
    contexts: list[Line] = []
    models = [r for r in drawn if r["implementation"] != RINGS]
    sizes = sorted({r["B"] for r in drawn if r["context"] != shortest})
    for B, dash in zip(sizes, ("-", "--", ":"), strict=False):
        mine = (r for r in models if r["B"] == B)
        contexts += lines(mine, "context", "ms", lambda r: f"{r['label']}, batch {r['B']}", dash)
    weights = " and ".join({f"{r['label']} {r['parameters'] / 1e6:.0f}M": None for r in models})
    graphs = ", CUDA graphs" if environment["device_type"] == "cuda" else ""
    setting = f"{weights} random weights, {drawn[0]['dtype']}{graphs}, transformers {environment['transformers']}"
    return Figure(
        "Generation against batch size and context",
        [
            Panel(f"context {length(shortest)}", "batch size", "tokens per second, the whole batch", batches),
            Panel("one token for every sequence", "context (tokens)", "ms for one step", contexts),
        ],
        caption(environment, setting),
        "TransNormerLLM with all its scheduling; softmax on a full static cache with none.",
    )


def show(report: Report) -> Iterator[Shown]:
    """The table, what stays constant, and the figure."""
    records = report.find(SUITE)
    yield from table(records)
    yield from constant(records)
    if any("ms" in r for r in records):
        yield figure(records, report.environment)


CASE = Case(measure, show, SCALES, needs=("transformers",), rows=rows)
