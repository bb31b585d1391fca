from dataclasses import replace

import matplotlib.image
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.cases import serve
from benchmarks.cases.serve import OURS, RINGS, SCALES, SOFTMAX, SUITE, Scale
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
        *((OURS, *pair) for pair in pairs), (RINGS, 1, 8), (RINGS, 3, 8), *((SOFTMAX, *pair) for pair in pairs)
    ]  # fmt: skip
    for r in measured:
        assert r["min_ms"] <= r["ms"] <= r["max_ms"]
        assert r["tokens_per_second"] == pytest.approx(r["B"] * 1e3 / r["ms"], rel=1e-4)
        # float32. Ours: 2 heads of 32 × 16 in the first layer, with LRPE, and of 16 × 16 in the second.
        # Rings: 16 keys and values of each head, and a count.
        states = 4 * 2 * (32 * 16 + 16 * 16)
        rings = 4 * 2 * 16 * (32 + 16 + 16 + 16) + 2 * 4
        kept = {OURS: states, RINGS: states + rings, SOFTMAX: 4 * 2 * 2 * 32 * r["context"]}
        assert r["state_bytes"] == r["B"] * kept[r["implementation"]]
        assert r.get("recent_tokens") == {OURS: 0, RINGS: 16, SOFTMAX: None}[r["implementation"]]


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
    warm_up, short, long, *rings = (positions[i : i + steps] for i in range(0, len(positions), steps))
    assert warm_up == short == [[8 + i] for i in range(steps)]
    assert long == [[30 + i] for i in range(steps)]
    assert rings == [short, short]


def test_only_the_rows_that_are_asked_for(report, run):
    names = list(serve.CASE.rows(TINY))
    assert names[:2] == ["transnormer, batch 1, context 8", "transnormer, batch 1, context 32"]
    assert len(set(names)) == len(names) == 10
    at_work = run(TINY)
    at_work.only = [name for name in names if "transnormer" in name and "batch 3, context 8" in name]
    serve.measure(at_work)
    assert [(r["implementation"], r["B"], r["context"]) for r in report.find(SUITE)] == [(OURS, 3, 8), (RINGS, 3, 8)]


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
