"""Steps of two gloo processes beside those of one."""

import math

import pytest

from benchmarks.cases import scaling

pytest.importorskip("transformers")


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(on_two_ranks):
    printed, records = on_two_ranks("scaling")
    assert records[0]["gathered_per_second"] > 0
    rows = [str(row) for row in scaling.SCALES["cpu"].rows]
    assert [(r["row"], r["ranks"]) for r in records[1:]] == [(row, ranks) for row in rows for ranks in (1, 2)]
    for alone, together in zip(records[1::2], records[2::2], strict=True):
        assert alone["loss"] == pytest.approx(math.log(512), rel=0.2)  # of a fresh model, on random tokens
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["largest_gradient_error"] < 1e-4
        for r in (alone, together):
            assert r["tokens_per_second"] == pytest.approx(1000 * r["B"] * r["T"] / r["ms"], rel=1e-4)
    assert printed.count("Training on many GPUs") == 1  # the first rank speaks, and no other
    assert "gradients differ by" in printed


def test_the_table_shows_what_is_left_of_the_speed(report):
    sizes = {"size": "385M", "way": "sp", "B": 1, "T": 1024}
    report.add(scaling.SUITE, row="385M sp 1 x 1024", ranks=1, tokens_per_second=200.0, **sizes)
    report.add(scaling.SUITE, row="385M sp 1 x 1024", ranks=2, tokens_per_second=150.0, peak_bytes=3e9, **sizes)
    report.add(scaling.SUITE, row="longer", ranks=1, skipped="no memory", **sizes)
    report.add(scaling.SUITE, row="longer", ranks=2, tokens_per_second=150.0, **sizes)
    (table,) = scaling.show(report)
    assert table.rows == [
        ["385M", "sp", "1 x 1,024", "2", "200", "150", "0.750", "", "3"],
        ["385M", "sp", "1 x 1,024", "2", "out of memory", "150", "", "", ""],
    ]
