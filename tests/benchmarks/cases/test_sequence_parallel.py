import pytest

from benchmarks.cases import sequence_parallel


@pytest.mark.slow
def test_two_ranks_measure_alone_and_together(on_two_ranks):
    printed, records = on_two_ranks("sequence_parallel")
    assert printed.count("Sequence parallelism (ms") == 1  # the first rank speaks, and no other
    tokens = sequence_parallel.SCALES["cpu"].tokens
    assert [(r["T"], r["decay"], r["pass"], r["ranks"]) for r in records] == [
        (T, decays, pass_, ranks)
        for T in tokens
        for decays in sequence_parallel.DECAYS
        for pass_ in ("forward", "forward+backward")
        for ranks in (1, 2)
    ]
    assert all(0 < r["min_ms"] <= r["ms"] <= r["max_ms"] for r in records)
    errors = [r["relative_error"] for r in records if "relative_error" in r]
    assert len(errors) == len(sequence_parallel.DECAYS)
    assert 0 < max(errors) < 1e-5


def test_the_table_has_a_row_for_each_number_of_tokens_and_kind_of_decays(report):
    for T, ms, decays in ((8192, 0.19, {}), (8192, 0.3, {"decay": "slow"}), (65_536, 0.7, {})):
        for ranks in (1, 2):
            for pass_ in ("forward", "forward+backward"):
                report.add(sequence_parallel.SUITE, **{"pass": pass_}, T=T, ranks=ranks, ms=ms * ranks, **decays)
    (table,) = sequence_parallel.show(report)
    assert table.columns == [
        "T a rank",
        "decays",
        *(f"{p}\n{n}" for n in ("1 rank", "2 ranks") for p in ("forward", "forward+backward")),
    ]
    assert table.rows[:2] == [
        ["8,192", "ALiBi", "0.19", "0.19", "0.38", "0.38"],
        ["8,192", "slow", "0.3", "0.3", "0.6", "0.6"],
    ]
    assert table.rows[2][0] == "65,536"
