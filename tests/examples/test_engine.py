"""The example of an engine: whatever joins, leaves, is guessed, kept and evicted, a request gets what it gets alone."""

import ast
import random
from pathlib import Path

import pytest
import torch

from tests.support.examples import EXAMPLES, load

VOCAB = 12

example = load("engine")


@pytest.fixture
def model():
    model = example.Model(VOCAB, width=32, heads=2, num_layers=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def greedy(model, prompt: list[int], count: int) -> list[int]:
    tokens = [*prompt]
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


def drawn(source: random.Random, count: int) -> list[tuple[list[int], int]]:
    """Prompts that share beginnings of several lengths."""
    long = [source.randrange(VOCAB) for _ in range(80)]
    return [
        (long[: source.choice([0, 16, 20, 48, 70])] + source.choices(range(VOCAB), k=source.randint(1, 30)), n)
        for n in source.choices(range(1, 25), k=count)
    ]


def run(engine, requests: list[tuple[list[int], int]], source: random.Random, cancelled=()) -> dict[int, list[int]]:
    """A request joins every few steps, and those of ``cancelled`` are taken out as soon as they run."""
    left, texts, numbers = [*requests], {}, []
    while left or engine.waiting or engine.running:
        if left and source.random() < 0.4:
            numbers.append(engine.submit(*left.pop(0)))
        texts |= engine.step()
        for number in {*cancelled} & {*engine.running}:
            engine.cancel(number)
    return texts


@pytest.mark.parametrize(("seed", "rows", "chunk"), [(0, 16, 64), (1, 5, 16), (2, 4, 7)])
def test_each_request_gets_what_it_gets_alone(model, seed: int, rows: int, chunk: int):
    source = random.Random(seed)
    requests = drawn(source, 14)
    engine = example.Engine(model, rows=rows, chunk=chunk)
    for pool in engine.pools:
        pool.fill_(torch.nan)
    texts = run(engine, requests, source, cancelled={3, 8})
    assert texts.keys() == {*range(1, 15)} - {3, 8}
    for number, text in texts.items():
        assert text == greedy(model, *requests[number - 1])
    assert engine.hits > 0
    assert engine.accepted > 5
    assert sorted([*engine.free, *engine.prefixes.values()]) == list(range(rows))


@pytest.mark.parametrize("wrong", ["prefix", "positions"])
def test_the_comparison_sees_what_is_forgotten(model, wrong: str, monkeypatch):
    source = random.Random(0)
    requests = drawn(source, 14)
    guesses = example.guesses
    if wrong == "prefix":  # the row is not copied
        monkeypatch.setattr(example.Engine, "_copy_prefix", lambda *_: 16)
    else:  # a tree's drafts stand one after the other
        monkeypatch.setattr(
            example, "guesses", lambda tokens: (*(g := guesses(tokens))[:2], [9 * i for i in range(len(g[0]))])
        )
    texts = run(example.Engine(model), requests, source)
    assert any(text != greedy(model, *requests[number - 1]) for number, text in texts.items())


def test_guesses_are_a_tree():
    tokens = [1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 1, 2, 3]
    assert example.guesses(tokens) == ([3, 4, 6, 1, 2, 5, 1, 2], [-1, 0, 1, 2, 3, 1, 5, 6], [0, 1, 2, 3, 4, 2, 3, 4])
    assert example.guesses([1, 2, 3]) == ([3], [-1], [0])


def test_it_learns(model):
    text = torch.arange(2000) % VOCAB
    example.train(model, text, steps=40, batch=4, length=32)
    texts = run(example.Engine(model), [(list(range(5)), 12)], random.Random(0))
    assert texts[1] == [i % VOCAB for i in range(17)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_need_no_private_name(path: Path):
    attributes = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    ]
    private = {
        ast.unparse(node)
        for node in attributes
        if node.attr.startswith("_") and not node.attr.startswith("__") and ast.unparse(node.value) != "self"
    }
    assert not private
