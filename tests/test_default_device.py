"""Another default device changes nothing: what is computed is where its inputs are.

The default is "meta", which every machine has and on which a forgotten tensor has no values: whatever meets it raises.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    decay,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_verify,
)
from lightning_attention.models.transnormer.mixer import TransnormerMixer
from lightning_attention.nn import LightningAttention, rope
from lightning_attention.ops import backends
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.support.numerics import budget, relative_error

Results = list[Tensor]
SOURCE = Path(backends.__file__).parents[1]


def elsewhere(other: bool) -> Any:
    return torch.device("meta") if other else nullcontext()


@contextmanager
def calls(backend: str, other: bool) -> Iterator[None]:
    """Calls of the public functions go to a backend, which on a CPU cannot always be asked for."""
    with patch.object(backends, "choose", lambda *_: backend), elsewhere(other):
        yield


def assert_equal(under_another: Results, expected: Results) -> None:
    assert len(under_another) == len(expected) > 0
    for a, e in zip(under_another, expected, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, e)


# The operations: every argument given, then as few as there can be.

H, D, E = 1, 16, 8
DECAY = decay.alibi(H)
LENGTHS, SLOTS = [20, 0, 1, 36], (5, 0, -1, 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def indices(*values: Any) -> Tensor:
    return torch.tensor(values, device="cpu")


def packed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, with three tokens of padding, and cu_seqlens."""
    T = sum(LENGTHS) + 3
    return normal(T, H, D), normal(T, H, D, seed=1), normal(T, H, E, seed=2), indices(*accumulate([0, *LENGTHS]))


def attention(backend: str, other: bool) -> Results:
    q, k, v, cu_seqlens = packed()
    inputs = [q[None], k[None], v[None], decay.alibi(H)]
    state = normal(len(LENGTHS), H, D, E, seed=3)
    wanted = [x.requires_grad_() for x in (*inputs, state)]
    with calls(backend, other):
        out, final = lightning_attention(
            *inputs, scale=0.5, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
        )
        found = [out, final, *torch.autograd.grad([out.sum(), final.square().sum()], wanted)]
        found += [lightning_attention(*inputs[:3], batch_invariant=True).output]
    return [x.detach() for x in found]


def pool() -> Tensor:
    return normal(8, H, D, E, seed=4)


@torch.no_grad()
def decode(backend: str, other: bool) -> Results:
    states = pool()
    q, k, v, _ = packed()
    with calls(backend, other):
        slots = indices(*SLOTS)
        out = lightning_attention_decode(q[:4], k[:4], v[:4], DECAY, states, slots=slots, scale=0.5)
        return [out, lightning_attention_decode(q[:8], k[:8], v[:8], None, states), states]


@torch.no_grad()
def prefill(backend: str, other: bool) -> Results:
    states = pool()
    q, k, v, cu_seqlens = packed()
    snapshots = {
        "snapshot_at": indices([8, 20], [0, 0], [1, 1], [35, 99]),
        "snapshot_slots": indices([1, 2], [-1, -1], [4, -1], [6, 7]),
    }
    batch = {"slots": indices(*SLOTS), "fresh": indices(True, False, False, False), "cu_seqlens": cu_seqlens}
    with calls(backend, other):
        out = lightning_attention_prefill(q, k, v, DECAY, states, **batch, **snapshots, scale=0.5)
        four = states[:4].clone()
        return [out, lightning_attention_prefill(q, k, v, None, four, cu_seqlens=cu_seqlens), states, four]


def drafts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *(x[:9] for x in packed()[:3]), indices(0, 4, 4, 5, 8)


@torch.no_grad()
def verify(backend: str, other: bool) -> Results:
    states = pool()
    q, k, v, cu_seqlens = drafts()
    batch = {"cu_seqlens": cu_seqlens, "slots": indices(*SLOTS), "scale": 0.5}
    with calls(backend, other):
        parents = indices(-1, 0, 0, -1, -1, -1, -1, 1, -1)
        return [
            lightning_attention_verify(q, k, v, DECAY, states, **batch, parents=parents),
            lightning_attention_verify(q, k, v, DECAY, states, **batch),
            lightning_attention_verify(q, k, v, None, states[:4], cu_seqlens=cu_seqlens),
        ]


@torch.no_grad()
def commit(backend: str, other: bool) -> Results:
    states = pool()
    _, k, v, cu_seqlens = drafts()
    batch = {
        "cu_seqlens": cu_seqlens,
        "accepted": indices(True, True, False, False, True, False, False, False, False),
    }
    with calls(backend, other):
        parents = indices(-1, 0, 0, -1, -1, -1, -1, 1, -1)
        lightning_attention_commit(k, v, DECAY, states, **batch, slots=indices(*SLOTS), parents=parents)
        four = states[:4].clone()
        lightning_attention_commit(k, v, None, four, **batch)
    return [states, four]


OPERATIONS = {f.__name__: f for f in (attention, decode, prefill, verify, commit)}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation: str):
    for backend in ("tiled", "reference") if operation == "attention" else ("tiled",):
        run = OPERATIONS[operation]
        assert_equal(run(backend, True), run(backend, False))


@interpreted
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_of_triton(interpreter: Interpreter, operation: str):
    run = OPERATIONS[operation]
    # Against the other backend, for interpreting takes seconds.
    for got, expected in zip(interpreter.call(run, "triton", True), run("tiled", False), strict=True):
        assert relative_error(got, expected) <= budget(torch.float32, gradient=True)


# The layers.

HIDDEN = 32
LAYERS: dict[str, Callable[[], TransnormerMixer | LightningAttention]] = {
    "minimax": lambda: LightningAttention.minimax(HIDDEN, 4, layer=1, num_layers=4),
    "bailing": lambda: LightningAttention.bailing(HIDDEN, 4, layer=1, num_layers=4),
    "transnormer": lambda: LightningAttention.transnormer(HIDDEN, 4, layer=0, num_layers=4),
    "gated": lambda: TransnormerMixer(HIDDEN, 4, decay.alibi(4), lrpe=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str):
    layer = LAYERS[name]()
    x, positions, cu_seqlens = normal(1, 20, HIDDEN), torch.arange(20), indices(0, 5, 20)

    def run(other: bool) -> Results:
        start = normal(2, *layer.state_shape)
        with elsewhere(other):
            out, final = layer(x, cu_seqlens=cu_seqlens, output_state=True)
            found = [out, final, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]
            found += [layer(x, state=start[:1], positions=positions)[0], layer(x)[0]]
            with torch.no_grad():
                found += [layer.prefill(x[0], start, cu_seqlens=cu_seqlens, positions=positions)]
                found += [layer.step(x[0, :2], start, positions=positions[:2])]
                found += layer.verify(
                    x[0], start, cu_seqlens=cu_seqlens, positions=positions, parents=indices(*[-1] * 20)
                )
                layer.commit(*found[-2:], start, cu_seqlens=cu_seqlens, accepted=positions < 3)
            found += [rope(found[-1], positions)]
        return [x.detach() for x in (*found, start)]

    assert_equal(run(True), run(False))


def test_a_layer_cast_under_another_default_device_keeps_its_decays():
    layer = LAYERS["minimax"]()
    expected = layer.log_decay.clone()
    with elsewhere(True):
        assert_equal([layer.bfloat16().log_decay, layer.double().log_decay], [expected, expected])


# The model.


@pytest.fixture
def model() -> Any:
    pytest.importorskip("transformers")
    from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM

    config = TransnormerConfig(
        vocab_size=97, decoder_embed_dim=HIDDEN, decoder_layers=2, decoder_attention_heads=2, hidden_dim=48, glu_dim=40
    )
    return TransnormerForCausalLM(config).eval()


def test_the_model_trains_and_generates(model):
    ids = torch.randint(3, 97, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    restarting = torch.cat([torch.arange(12), torch.arange(18)])[None]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def run(other: bool) -> Results:
        with elsewhere(other):
            loss = model(ids, attention_mask=mask, labels=ids).loss
            found = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
            found += [model(ids, position_ids=restarting, labels=ids).loss]
            found += [model(ids[:1], cu_seqlens=indices(0, 4, 30), labels=ids[:1]).loss]
            found += [model.generate(ids, attention_mask=mask, **options), model.generate(ids, **options)]
            # Not by beams, for which transformers makes tensors without a device.
        return [x.detach() for x in found]

    assert_equal(run(True), run(False))


def test_continuous_batching(model):
    from lightning_attention.serving import ContinuousBatch, Request

    requests = [Request([3] * n, 5, temperature=t, top_p=0.9) for n in (1, 30, 70) for t in (0.0, 1.0)]

    def run(other: bool) -> Results:
        given = []
        with elsewhere(other):
            batch = ContinuousBatch(model, max_batch=4, prefill_tokens=16, suppress=[0])
            for request in requests:
                batch.submit(request)
            while batch.busy:
                given += batch.step()
        return [indices(*((t.request, t.token) for t in given)), *batch.states]

    assert_equal(run(True), run(False))


# What runs on another machine only: read, not run.

CONSTRUCTORS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros"),
}


def made_anywhere(source: str) -> list[int]:
    """The lines that make a tensor without saying where."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in CONSTRUCTORS) == ("torch", True)
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]


def test_no_tensor_is_made_without_a_device():
    # Schedules, parameters and buffers are made where the caller's default device says, as PyTorch's own modules are.
    found = {
        f"{path.relative_to(SOURCE)}:{line}"
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).parts[0] not in {"decay.py", "nn"}
        for line in made_anywhere(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_a_tensor_without_a_device_is_seen():
    source = "import torch\ntorch.zeros(3, dtype=torch.long)\ntorch.zeros(3, device=x.device)\ntorch.arange(3)\n"
    assert made_anywhere(source) == [2, 4]
