"""The example of a hybrid model: it learns, and reads in pieces or served in a batch what it reads at once."""

import email
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_attention.serving import ContinuousBatch, Request
from tests.support.examples import load
from tests.support.numerics import relative_error

hybrid = load("hybrid")


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, Tensor, list[float]]:
    torch.manual_seed(0)
    source = b"".join(path.read_bytes() for path in sorted(Path(email.__file__).parent.glob("*.py")))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()
    model = hybrid.Hybrid(width=48)
    return model, text, hybrid.train(model, text, steps=40, batch=8, length=96)


def test_it_is_seven_to_one():
    model = hybrid.Hybrid(width=16, num_layers=16)
    assert [block.softmax for block in model.blocks] == 2 * [*[False] * 7, True]
    assert len({tuple(block.mixer.log_decay.tolist()) for block in model.blocks if not block.softmax}) == 14


def test_it_learns_more_than_how_often_each_byte_comes(trained: tuple[torch.nn.Module, Tensor, list[float]]):
    _, text, losses = trained
    share = text.bincount(minlength=256) / len(text)
    alone = -(share * share.clamp(min=1e-9).log2()).sum().item()
    assert losses[0] > 7.5  # guessing takes 8 bits
    assert sum(losses[-5:]) / 5 < alone - 0.3


@torch.no_grad()
def test_reading_in_chunks_is_reading_at_once(trained: tuple[torch.nn.Module, Tensor, list[float]]):
    model, text, _ = trained
    ids = torch.stack([text[:200], text[500:700]])
    whole, cache = model(ids)
    pieces, carried, at = [], None, 0
    for part in ids.split([70, 1, 128, 1], 1):
        logits, carried = model(part, carried, at)
        pieces.append(logits)
        at += part.shape[1]
    assert relative_error(torch.cat(pieces, 1), whole) <= 1e-5
    for block, a, b in zip(model.blocks, carried, cache, strict=True):
        for x, y in zip(a if block.softmax else [a], b if block.softmax else [b], strict=True):
            assert relative_error(x, y) <= 1e-5
    # The check notices what is forgotten: the states, or where the tokens stand.
    tail, _ = model(ids[:, 70:], None, 70)
    assert relative_error(tail, whole[:, 70:]) > 1e-2
    first = model(ids[:, :70])[1]
    assert relative_error(model(ids[:, 70:], first, 0)[0], whole[:, 70:]) > 1e-3


@torch.no_grad()
def test_it_writes_what_it_would_write_without_a_cache(trained: tuple[torch.nn.Module, Tensor, list[float]]):
    model, text, _ = trained
    prompt = ids = text[None, 1000:1090]
    for _ in range(12):
        ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12, chunk=32), ids)


def serve(model: torch.nn.Module, requests: list[Request], **settings) -> list[list[int]]:
    """The texts of requests that join one after another, a few steps apart."""
    batch, texts, left = ContinuousBatch(model, **settings), [[] for _ in requests], [*requests]
    while left or batch.busy:
        if left:
            batch.submit(left.pop(0))
        for _ in range(3):
            for number, token, _ in batch.step():
                texts[number].append(token)
    return texts


@pytest.fixture
def model() -> torch.nn.Module:
    """Weights so large that every block matters to the tokens."""
    model = hybrid.Hybrid(40, width=32, heads=2, context_length=170)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def drawn(*sizes: tuple[int, int]) -> list[Request]:
    return [Request(torch.randint(40, (length,)), count) for length, count in sizes]


def alone(model: torch.nn.Module, request: Request) -> list[int]:
    return model.generate(torch.tensor([request.prompt]), request.max_tokens)[0, len(request.prompt) :].tolist()


@pytest.mark.parametrize(("max_batch", "prefill_tokens"), [(8, 2048), (3, 40), (1, 7)])
def test_the_engine_serves_it(model: torch.nn.Module, max_batch: int, prefill_tokens: int):
    requests = drawn((90, 12), (1, 9), (33, 20), (150, 20), (2, 1), (5, 30))
    texts = serve(model, requests, max_batch=max_batch, prefill_tokens=prefill_tokens)
    assert texts == [alone(model, request) for request in requests]


@pytest.mark.parametrize("wrong", ["slots", "positions"])
def test_the_comparison_sees_another_sequences_cache(
    model: torch.nn.Module, wrong: str, monkeypatch: pytest.MonkeyPatch
):
    step = hybrid.SoftmaxAttention.step
    monkeypatch.setattr(
        hybrid.SoftmaxAttention,
        "step",
        lambda self, x, state, **batch: step(self, x, state, **{**batch, wrong: torch.zeros_like(batch[wrong])}),
    )
    requests = drawn((60, 40), (50, 40), (9, 40))
    assert serve(model, requests) != [alone(model, request) for request in requests]


def test_a_request_longer_than_its_context_is_refused():
    batch = ContinuousBatch(hybrid.Hybrid(width=16, context_length=20))
    batch.submit(Request([1] * 15, 5))
    with pytest.raises(ValueError, match="prompt and max_tokens are 21 tokens; the model's context_length is 20"):
        batch.submit(Request([1] * 15, 6))
