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
    wanted = [(row, ranks) for row in rows for ranks in (1, 2)]
    pairs, meshes = records[1 : 1 + len(wanted)], records[1 + len(wanted) :]
    assert [(r["row"], r["ranks"]) for r in pairs] == wanted
    for alone, together in zip(pairs[::2], pairs[1::2], strict=True):
        assert alone["loss"] == pytest.approx(math.log(512), rel=0.2)  # of a fresh model, on random tokens
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["largest_gradient_error"] < 1e-4
        for r in (alone, together):
            assert r["tokens_per_second"] == pytest.approx(1000 * r["B"] * r["T"] / r["ms"], rel=1e-4)
    assert printed.count("Training on many GPUs") == 1  # the first rank speaks, and no other
    assert "gradients differ by" in printed

    assert [(r["row"], r["ranks"]) for r in meshes] == [("75M 2x1 1 x 16", 2), ("75M 1x2 1 x 16", 2)]
    whole, cut = meshes
    assert len(whole["losses"]) == scaling.SCALES["cpu"].mesh_steps
    assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert cut["largest_loss_difference"] < 1e-6
    assert len(cut["devices"]) == 2
    # Two sequences in two layers of two heads of 32, the first with LRPE, which doubles D: states forward, with the
    # sequence's length in each layer, and their gradients backward.
    states = 2 * (64 + 32) * 32
    assert cut["state_bytes"] == 4 * 2 * (2 * states + 2)
    for r in meshes:
        assert r["state_bytes"] == r["state_bytes_at_half"] == r["state_bytes_by_formula"]
    assert whole["state_bytes"] == 0
    assert printed.count("The same steps on every mesh") == 1


def test_meshes_use_all_ranks():
    ways = {ranks: [row.way for row in scaling.SCALES["cuda"].meshes(ranks)] for ranks in (4, 6, 8)}
    assert ways[4] == ["4x1", "2x2", "1x4"]
    assert ways[6] == ["6x1", "3x2", "2x3", "1x6"]
    assert ways[8] == ["8x1", "4x2", "2x4", "1x8"]


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


def test_the_table_of_meshes_shows_how_far_losses_differ(report):
    about = {"size": "385M", "B": 1, "T": 8192, "ranks": 4, "tokens_per_second": 81_920.0, "peak_bytes": 12e9}
    bytes_ = dict.fromkeys(("state_bytes", "state_bytes_at_half", "state_bytes_by_formula"), 2048)
    report.add(scaling.SUITE, row="a", way="4x1", ms=100.0, losses=[11.0, 9.5], **about, **bytes_)
    report.add(
        scaling.SUITE,
        row="b",
        way="2x2",
        ms=125.0,
        losses=[11.0, 9.6],
        largest_loss_difference=0.0105,
        **about,
        **bytes_,
    )
    (table,) = scaling.show(report)
    sent = ["2,048"] * 3
    assert table.rows == [
        ["385M", "4x1", "1 x 8,192", "100", "81,920", "12.0", "11.00000", "9.50000", "", *sent],
        ["385M", "2x2", "1 x 8,192", "125", "81,920", "12.0", "11.00000", "9.60000", "1.1e-02", *sent],
    ]
