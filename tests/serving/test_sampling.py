import pytest
import torch

pytest.importorskip("transformers")

from lightning_attention.serving.sampling import sample


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.05, 0.3, 0.15])
    draws = (torch.arange(1000) + 0.5) / 1000
    logits = probabilities.log().expand(1000, 4)

    def shares(temperature=1.0, top_p=1.0):
        tokens = sample(logits, torch.full((1000,), temperature), torch.full((1000,), top_p), draws)
        return (tokens.bincount(minlength=4) / 1000).tolist()

    assert shares() == pytest.approx([0.5, 0.05, 0.3, 0.15], abs=2e-3)
    assert shares(top_p=0.8) == pytest.approx([0.625, 0, 0.375, 0], abs=2e-3)
    assert shares(top_p=0.81) == pytest.approx([0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95], abs=2e-3)
    assert shares(top_p=0.0) == [1, 0, 0, 0]
    sharpened = probabilities**2 / (probabilities**2).sum()
    assert shares(temperature=0.5) == pytest.approx(sharpened.tolist(), abs=2e-3)
    assert shares(temperature=0.0) == [1, 0, 0, 0]


def test_sampling_at_the_edges():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    for draw in (0.0, 1 - 2**-24):
        token = sample(logits, torch.ones(1), torch.ones(1), torch.tensor([draw]))
        assert token.item() != 1  # what has no probability is not drawn


def test_every_row_has_settings_of_its_own():
    logits = torch.tensor([2.0, 1.0, 0.0]).repeat(4, 1)
    temperature, top_p = torch.tensor([0.0, 1.0, 1.0, 50.0]), torch.tensor([1.0, 1.0, 0.5, 1.0])
    assert sample(logits, temperature, top_p, torch.full((4,), 0.95)).tolist() == [0, 2, 0, 2]
    assert sample(logits, temperature, top_p, torch.full((4,), 0.5)).tolist() == [0, 0, 0, 1]


def test_greedy_rows_look_at_logits_not_at_probabilities():
    # The two largest differ by less than float32 probabilities tell apart.
    logits = torch.tensor([[1e-8, 2e-8, -1.0], [1.0, 0.0, -1.0]])
    assert logits[0].softmax(0)[0] == logits[0].softmax(0)[1]
    assert sample(logits, torch.tensor([0.0, 1.0]), torch.ones(2), torch.zeros(2)).tolist() == [1, 0]


def test_a_small_temperature_is_as_good_as_none():
    logits = torch.tensor([30.0, 29.0, -torch.inf, 30.5]).expand(3, 4)
    temperature = torch.tensor([1e-3, 1e-37, 1e-44])  # at 1e-37, 30 becomes inf
    assert sample(logits, temperature, torch.ones(3), torch.full((3,), 0.999)).tolist() == [3, 3, 3]
