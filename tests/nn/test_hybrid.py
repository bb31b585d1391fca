"""The example of a hybrid model: it learns, and reading in pieces through states and a KV cache changes nothing."""

import email
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.numerics import relative_error

EXAMPLE = Path(__file__).parents[2] / "examples" / "hybrid.py"


def load():
    spec = importlib.util.spec_from_file_location("hybrid", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hybrid = load()


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
