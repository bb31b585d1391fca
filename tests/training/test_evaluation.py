"""The loss on a text against one pass over it in float64, and against what the trainer says of the same text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.errors import DivergedError, InputError
from lightning_attention.training import evaluation
from lightning_attention.training.config import make_config
from lightning_attention.training.evaluation import Evaluation, evaluate, strided, token_losses
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.tokenizer import END_ID
from lightning_attention.training.trained import Trained, open_trained
from tests.training.tiny import tiny_settings, train, write_text

CPU = Runtime.choose("cpu", "float32")
MODELS = ("transnormer", "llama")


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    """A run of a few steps that is validated on a text of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    held_out = folder / "held_out.jsonl"
    lines = write_text(folder / "other.txt", 300).read_text(encoding="utf-8").splitlines()
    texts = ["\n".join(lines[at : at + 7]) for at in range(0, len(lines), 7)]
    texts.append("It says <|endoftext|> and <|padding|>, in words.")
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    settings = tiny_settings(folder, model=request.param, validation=str(held_out), eval_tokens=0)
    _, outcome = train(settings)
    return outcome, held_out, texts


def measure(path: Path, held_out: Path, **how) -> Evaluation:
    return evaluate(open_trained(path), make_config({"inputs": [str(held_out)]}), CPU, **how)


def stream(trained: Trained, texts: list[str]) -> torch.Tensor:
    """The tokens of the texts, one after another, with the one before them."""
    ids = [END_ID]
    for text in dict.fromkeys(texts):
        ids += [*trained.tokenizer.encode(text, split_special_tokens=True), END_ID]
    return torch.tensor(ids)


def test_is_what_training_says_where_documents_are_joined(run, tmp_path):
    _, held_out, _ = run
    _, outcome = train(tiny_settings(tmp_path, validation=str(held_out), eval_tokens=0, documents="joined"))
    last = read_metrics(outcome.metrics)[-1]["val_loss"]
    assert measure(outcome.checkpoint, held_out, seq_len=24).loss == pytest.approx(last, rel=1e-5)
    apart = evaluate(open_trained(outcome.checkpoint)._replace(joins_documents=False),
                     make_config({"inputs": [str(held_out)]}), CPU, seq_len=24)  # fmt: skip
    assert apart.loss != pytest.approx(last, rel=1e-5)


def test_is_what_training_says(run):
    outcome, held_out, texts = run
    found = measure(outcome.checkpoint, held_out, seq_len=24)
    last = read_metrics(outcome.metrics)[-1]
    assert found.loss == pytest.approx(last["val_loss"], rel=1e-5)
    assert found.bits_per_byte == pytest.approx(last["val_bits_per_byte"], rel=1e-5)
    assert found.documents == len(set(texts))
    assert found.text_bytes == sum(len(text.encode()) for text in dict.fromkeys(texts))
    assert found.tokens == len(stream(open_trained(outcome.checkpoint), texts)) - 1
    # A run is its newest checkpoint.
    assert measure(outcome.checkpoint.parents[1], held_out, seq_len=24) == found


@pytest.mark.parametrize(("seq_len", "stride"), [(33, None), (33, 10), (9, 4), (100_000, None)])
def test_is_the_mean_of_the_windows(run, seq_len, stride):
    """In float64, every document of a window by itself: an end-of-text token is the first of the one after it."""
    outcome, held_out, texts = run
    trained = open_trained(outcome.checkpoint)
    found = measure(outcome.checkpoint, held_out, seq_len=seq_len, stride=stride, batch_size=3)
    ids, step = stream(trained, texts), stride or seq_len - 1
    model = trained.model.double().eval()
    by_place: dict[int, list[float]] = {}
    end = 0  # of the tokens that have been counted, with the one before the text
    while end < len(ids) - 1:
        start = end - (seq_len - 1 - step) if end else 0
        stop = min(start + seq_len, len(ids))
        read = ids[start : stop - 1]
        borders = [at for at in range(1, len(read)) if read[at] == trained.tokenizer.eos_token_id]
        documents = read.tensor_split(borders)
        with torch.no_grad():
            logits = torch.cat([model(document[None], use_cache=False).logits[0] for document in documents])
        nats = -logits.log_softmax(-1).gather(-1, ids[start + 1 : stop, None])[:, 0]
        places = torch.cat([torch.arange(1, len(document) + 1) for document in documents])
        for at in range(end - start, stop - 1 - start):
            by_place.setdefault(int(places[at]), []).append(float(nats[at]))
        end = stop - 1
    total = [x for losses in by_place.values() for x in losses]
    assert found.tokens == len(total) == len(ids) - 1
    assert found.loss == pytest.approx(np.mean(total), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(total) / math.log(2) / found.text_bytes, rel=1e-5)
    assert sum(bucket.tokens for bucket in found.by_position) == len(total)
    for bucket in found.by_position:
        assert math.log2(bucket.first).is_integer()
        assert bucket.last == min(2 * bucket.first - 1, seq_len - 1)
        within = [x for place in range(bucket.first, bucket.last + 1) for x in by_place.get(place, [])]
        assert bucket.tokens == len(within)
        assert bucket.loss == pytest.approx(np.mean(within), rel=1e-5)


def test_logits_are_made_in_parts(run, monkeypatch):
    outcome, held_out, _ = run
    whole = measure(outcome.checkpoint, held_out, seq_len=50)
    monkeypatch.setattr(evaluation, "MOST_LOGITS", 7 * 300)
    trained, seen = open_trained(outcome.checkpoint), []
    trained.model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.shape[0]))
    found = evaluate(trained, make_config({"inputs": [str(held_out)]}), CPU, seq_len=50)
    assert max(seen) == 7
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(2, 20), st.data())
def test_every_token_counts_once_after_those_before_it(sizes, seq_len, data):
    stride = data.draw(st.integers(1, seq_len - 1))
    tokens = np.arange(1, sum(sizes) + 1)
    windows = list(strided(np.split(tokens, np.cumsum(sizes)[:-1]) if sizes else [], 0, seq_len, stride))
    counted = [token for window, skipped in windows for token in window[1 + skipped :]]
    assert counted == tokens.tolist()
    for number, (window, skipped) in enumerate(windows):
        assert len(window) <= seq_len
        assert np.all(np.diff(window) == 1)
        assert skipped == (seq_len - 1 - stride if number else 0)


def test_what_cannot_be_evaluated(run, tmp_path):
    outcome, held_out, _ = run
    for stride in (0, 24, -1):
        with pytest.raises(InputError, match=f"stride must be from 1 to 23, one less than seq_len; got {stride}"):
            measure(outcome.checkpoint, held_out, seq_len=24, stride=stride)
    trained = open_trained(outcome.checkpoint)
    trained.tokenizer.add_tokens(["<another>"])
    with pytest.raises(InputError, match=r"the tokenizer in .* has \d+ tokens, the model \d+"):
        evaluate(trained, make_config({"inputs": [str(held_out)]}), CPU, seq_len=24)
    trained = open_trained(outcome.checkpoint)
    with torch.no_grad():
        next(trained.model.parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match="the loss is nan on this text"):
        evaluate(trained, make_config({"inputs": [str(held_out)]}), CPU, seq_len=24)


def test_a_bfloat16_model_has_float32_losses(run):
    trained = open_trained(run[0].checkpoint)
    ids = torch.randint(2, 200, (2, 30))
    positions = torch.arange(29).expand(2, 29)
    exact = token_losses(trained.model, ids, positions)
    rounded = token_losses(trained.model.to(torch.bfloat16), ids, positions)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
