from dataclasses import replace

import matplotlib.image
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.cases import serve
from benchmarks.cases.serve import OURS, SCALES, SOFTMAX, SUITE, Scale
from lightning_attention.bench.case import Run
from lightning_attention.bench.report import Report, environment
from lightning_attention.serving.engine import ContinuousBatch

SIZES = {"decoder_layers": 2, "decoder_embed_dim": 32, "decoder_attention_heads": 2, "glu_dim": 85, "vocab_size": 97}
TINY = Scale((1, 3), {1: (8, 32), 3: (16,)}, 8, torch.float32, SIZES, steps=2, windows=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    cpu = torch.device("cpu")
    report = Report(tmp_path_factory.mktemp("serve") / "serve.json", environment(cpu))
    serve.measure(Run(report, cpu, TINY, say=len))
    return report.find(SUITE)


def test_both_models_at_every_batch_size_and_context(measured):
    pairs = [(1, 8), (1, 32), (3, 8), (3, 16)]
    assert [(r["implementation"], r["B"], r["context"]) for r in measured] == [
        (name, *pair) for name in (OURS, SOFTMAX) for pair in pairs
    ]
    for r in measured:
        assert r["min_ms"] <= r["ms"] <= r["max_ms"]
        assert r["tokens_per_second"] == pytest.approx(r["B"] * 1e3 / r["ms"], rel=1e-4)
        # float32. Ours: 2 heads of 32 × 16 in the first layer, with LRPE, and of 16 × 16 in the second.
        kept = 4 * 2 * (32 * 16 + 16 * 16) if r["implementation"] == OURS else 4 * 2 * 2 * 32 * r["context"]
        assert r["state_bytes"] == r["B"] * kept


def test_the_models_are_of_one_size(measured):
    ours, softmax = (
        {r["parameters"] for r in measured if r["implementation"] == name}.pop() for name in (OURS, SOFTMAX)
    )
    assert softmax == pytest.approx(ours, rel=0.03)
    with torch.device("meta"):
        llama = serve._llama(SCALES["cuda"])
    weights = sum(p.numel() for p in llama.parameters())
    # The released 385M: embedding, head, and per layer five projections, three in the SGLU; frequencies once.
    assert weights == pytest.approx(2 * 64000 * 1024 + 24 * (5 * 1024 * 1024 + 3 * 1024 * 2816) + 1024, rel=2e-3)


def test_contexts_are_really_read_and_their_steps_taken(report, run, monkeypatch):
    positions = []
    decode = ContinuousBatch._decode

    def watch(self, decoding):
        positions.append([s.position for s in decoding])
        return decode(self, decoding)

    monkeypatch.setattr(ContinuousBatch, "_decode", watch)
    serve.measure(run(replace(TINY, batches=(1,), contexts={1: (8, 30)})))
    steps = 3 + 2 * 2
    warm_up, short, long = (positions[i * steps : (i + 1) * steps] for i in range(3))
    assert warm_up == short == [[8 + i] for i in range(steps)]
    assert long == [[30 + i] for i in range(steps)]


def test_the_softmax_model_attends_to_its_whole_cache(cpu):
    model = serve._llama(TINY).eval()
    with torch.inference_mode(), serve._generate_softmax(model, 1, 12, TINY, cpu) as (step, _, _):
        decode = dict(zip(step.__code__.co_freevars, (c.cell_contents for c in step.__closure__), strict=True))
        cache, ids = decode["cache"], decode["ids"]
        keys, token = cache.layers[0].keys.clone(), ids.clone()
        step()
        assert (cache.layers[0].keys[:, :, :-1] == keys[:, :, :-1]).all()  # the last place is the new token's
        assert not torch.equal(cache.layers[0].keys[:, :, -1], keys[:, :, -1])
        assert [int(layer.cumulative_length) for layer in cache.layers] == [12, 12]
        first = int(ids)
        # What is in the first place of the cache has a part in the result.
        for layer in cache.layers:
            layer.values[:, :, 0] = 1e4
        ids.copy_(token)
        step()
        assert int(ids) != first


def test_what_does_not_fit_is_skipped(report, run, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "_free_bytes", lambda _: 5000)
    said = []
    at_work = run(replace(TINY, contexts={1: (8, 32)}))
    at_work.say = said.append
    serve.measure(at_work)
    skipped = [r for r in report.find(SUITE) if "skipped" in r]
    assert [(r["implementation"], r["B"], r["context"]) for r in skipped] == [(SOFTMAX, 1, 32), (SOFTMAX, 3, 8)]
    assert skipped[0]["skipped"] == "a cache of 0.0 GB in 0.0 GB of memory"
    assert sum("skipped a cache" in line for line in said) == 2
    assert str(next(serve.table(report.records))).count("no room") == 2
    serve.figure(report.records, report.environment).save(tmp_path / "x.png")


def test_says_how_constant_time_and_memory_are():
    records = [
        {"implementation": OURS, "B": B, "context": context, "ms": ms, "peak_bytes": peak}
        for B, context, ms, peak in [
            (1, 1024, 1.0, 100),
            (1, 4096, 1.05, 100),
            (1, 1 << 20, 0.98, 102),
            (4, 1024, 2.0, 9),
        ]
    ]
    (line,) = serve.constant(records)
    assert line.startswith("batch 1: a step takes 1.000 ms at context 1k and 0.980 ms at context 1M; ")
    assert "the time differs by 7.1%" in line
    assert line.endswith("the peak of memory by 2.0%")


def test_the_figure_is_drawn(measured, report, tmp_path):
    serve.figure(measured, report.environment).save(tmp_path / "serve.png")
    pixels = matplotlib.image.imread(tmp_path / "serve.png")
    assert pixels.shape[1] > 1500
    assert len(set(map(tuple, pixels[::8, ::8, :3].reshape(-1, 3).tolist()))) > 10
