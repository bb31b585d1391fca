from dataclasses import replace

import pytest
import torch

from lightning_attention.bench import lengths
from lightning_attention.bench.attention import BOTH, FORWARD, Shape
from lightning_attention.bench.lengths import Sweep
from lightning_attention.bench.peers import SDPA, ours

SWEEP = Sweep((64, 128, 256), H=2, D=16, dtype=torch.float32, tokens=1, limit_s=10, seconds=0.01)
OURS = {"implementation": "lightning_attention", "label": "lightning attention"}
FLA = {"implementation": "fla", "label": "flash-linear-attention"}
SHAPE = {"B": 4, "T": 2048, "H": 32, "D": 128, "dtype": "bfloat16"}


def test_lengths_records_every_length_pass_and_implementation(report, run):
    implementations = [ours(), SDPA[0]]
    lengths.sweep(run(SWEEP, SDPA[:1]))
    keys = [(r["T"], r["pass"], r["implementation"]) for r in report.records]
    assert keys == [(T, p, i.name) for T in SWEEP.lengths for p in (FORWARD, BOTH) for i in implementations]
    for r in report.records:
        assert (r["B"], r["H"], r["D"], r["dtype"]) == (1, 2, 16, "float32")
        assert r["us_per_token"] == pytest.approx(r["ms"] * 1e3 / r["T"], rel=1e-4)
        assert r["min_ms"] <= r["ms"] <= r["max_ms"]
        assert r["repeats"] >= 3
        tensor = r["T"] * 2 * 16 * 4
        assert r["peak_bytes"] >= (tensor if r["pass"] == FORWARD else 4 * tensor)  # o, dq, dk, dv
        assert r["bytes_per_token"] == pytest.approx(r["peak_bytes"] / r["T"], rel=1e-4)


def test_the_batch_keeps_the_number_of_tokens(report, run):
    lengths.sweep(run(replace(SWEEP, tokens=256)))
    assert {(r["B"], r["T"]) for r in report.records} == {(4, 64), (2, 128), (1, 256)}


def test_a_peer_stops_where_a_call_would_take_too_long_and_ours_does_not(report, run):
    said = []
    at_work = run(replace(SWEEP, limit_s=0), SDPA[:1])
    at_work.say = said.append
    lengths.sweep(at_work)
    softmax = report.find("lengths", implementation="sdpa")
    assert [(r["T"], r["pass"], "skipped" in r) for r in softmax] == [
        (64, FORWARD, False),
        (64, BOTH, False),
        (128, FORWARD, True),
        (128, BOTH, True),
    ]
    assert "more than 0 s" in softmax[-1]["skipped"]
    assert [r["T"] for r in report.find("lengths", implementation="lightning_attention", **{"pass": BOTH})] == [
        64,
        128,
        256,
    ]
    assert sum("skipped" in line for line in said) == 2


@pytest.mark.parametrize(("softmax", "factor"), [(False, 2), (True, 4)])
def test_what_a_call_is_expected_to_take(softmax, factor):
    before, after = Shape(1, 1024, 8, 64), Shape(1, 2048, 8, 64)
    assert lengths.expected_s(500, before, after, softmax) == pytest.approx(0.5 * factor)
    assert lengths.expected_s(500, Shape(2, 1024, 8, 64), after, softmax) == pytest.approx(0.5 * factor / 2)


def test_lengths_table_gives_ratios_and_gaps():
    records = []
    for pass_ in (FORWARD, BOTH):
        values = {"pass": pass_, "bytes_per_token": 4096.0}
        records.append(SHAPE | OURS | values | {"ms": 2.0, "us_per_token": 0.25})
        records.append(SHAPE | FLA | values | {"ms": 7.0, "us_per_token": 0.875})
        records.append(SHAPE | OURS | values | {"T": 4096, "ms": 4.0, "us_per_token": 0.25})
        records.append(SHAPE | FLA | {"T": 4096, "pass": pass_, "skipped": "too long"})
    forward, both = lengths.tables(records)
    assert forward.title == "forward, per token"
    assert both.title == "forward+backward, per token"
    assert forward.rows[0] == ["2,048", "0.25", "4,096", "0.875", "4,096", "3.5×"]
    assert forward.rows[1] == ["4,096", "0.25", "4,096", "–", "", ""]


def test_spread_is_of_ours_from_the_length_on():
    records = [SHAPE | OURS | {"T": T, "pass": FORWARD, "ms": 1.0, "us_per_token": us}
               for T, us in ((2048, 9.0), (8192, 1.0), (16_384, 1.08), (32_768, 1.02))]  # fmt: skip
    records.append(SHAPE | FLA | {"T": 8192, "pass": FORWARD, "ms": 1.0, "us_per_token": 50.0})
    assert lengths.spread(records, FORWARD, 8192) == pytest.approx(0.08)
    assert lengths.spread(records, BOTH, 8192) is None
    assert lengths.constant(records) == ["forward: our time per token from T = 8,192 to 32,768 varies by 8%"]
