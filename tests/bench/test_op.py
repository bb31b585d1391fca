from dataclasses import replace

import pytest
import torch

from lightning_attention.bench import op
from lightning_attention.bench.op import BACKWARD, BOTH, FORWARD, Problem, Shape, Sweep, measure
from lightning_attention.bench.peers import Implementation, ours, peers

SWEEP = Sweep((64, 128, 256), H=2, D=16, dtype=torch.float32, tokens=1, limit_s=10, seconds=0.01)


def silent(_: str) -> None:
    """Say nothing."""


def test_the_floor_of_the_paper_shape():
    """B4 T32768 H32 D128 in two bytes at 4.25 TB/s: 1.01 ms forward and 1.77 ms backward."""
    shape = Shape(4, 32_768, 32, 128)
    assert shape.unit_bytes(torch.bfloat16) == 1 << 30
    assert shape.floor_ms(FORWARD, torch.bfloat16, 4.25e12) == pytest.approx(1.0106, rel=1e-4)
    assert shape.floor_ms(BACKWARD, torch.bfloat16, 4.25e12) == pytest.approx(1.7685, rel=1e-4)
    assert shape.floor_ms(BOTH, torch.bfloat16, 4.25e12) == pytest.approx(2.7791, rel=1e-4)


def test_lengths_records_every_length_pass_and_implementation(report, cpu):
    implementations = [ours(), *peers(["sdpa"], cpu)]
    op.lengths(report, implementations, SWEEP, cpu, "lengths", silent)
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


def test_the_batch_keeps_the_number_of_tokens(report, cpu):
    op.lengths(report, [ours()], replace(SWEEP, tokens=256), cpu, "lengths", silent)
    assert {(r["B"], r["T"]) for r in report.records} == {(4, 64), (2, 128), (1, 256)}


def test_a_peer_stops_where_a_call_would_take_too_long_and_ours_does_not(report, cpu):
    said = []
    op.lengths(report, [ours(), *peers(["sdpa"], cpu)], replace(SWEEP, limit_s=0), cpu, "lengths", said.append)
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
    assert op._expected_s(500, before, after, softmax) == pytest.approx(0.5 * factor)
    assert op._expected_s(500, Shape(2, 1024, 8, 64), after, softmax) == pytest.approx(0.5 * factor / 2)


@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD, BOTH])
def test_calls_compute_what_their_pass_says(pass_, cpu):
    problem = Problem(Shape(1, 70, 2, 16), torch.float64, cpu)
    found = problem.call(ours("reference"), pass_)()
    wanted = problem.reference()
    got = [found] if pass_ == FORWARD else list(found)
    names = ["output"] if pass_ == FORWARD else ["dq", "dk", "dv"]
    for name, x in zip(names, got, strict=True):
        torch.testing.assert_close(x, wanted[name], rtol=1e-10, atol=1e-10)


def test_errors_are_small_for_ours_and_large_for_a_wrong_one(cpu):
    problem = Problem(Shape(2, 100, 4, 16), torch.bfloat16, cpu)
    reference = problem.reference()
    assert reference["output"].shape == (1, 100, 2, 16)  # the last sequence, its first and last head
    good = problem.errors(ours(), reference)
    assert list(good) == ["output", "dq", "dk", "dv"]
    assert all(1e-4 < error < 5e-3 for error in good.values())

    def load():
        right = ours().load()
        return lambda q, k, v, log_decay: right(q, k, v, log_decay * 1.05)

    wrong = problem.errors(Implementation("wrong", "wrong", "none", load), reference)
    assert min(wrong.values()) > 5e-3


def test_an_implementation_that_fails_is_a_record(cpu):
    def load():
        return lambda q, k, v, log_decay: torch.linalg.inv(q)

    found = measure([Implementation("bad", "bad", "none", load)], Problem(Shape(1, 8, 1, 4), torch.float32, cpu),
                    FORWARD, seconds=0.01)  # fmt: skip
    assert list(found["bad"]) == ["error"]
    assert "must be batches of square matrices" in found["bad"]["error"]
