import pytest
import torch

from benchmarks.cases import shapes
from benchmarks.cases.shapes import Scale, floor_ms, unit_bytes
from lightning_attention.bench.attention import BACKWARD, BOTH, FORWARD, Problem, Shape
from lightning_attention.bench.peers import ATTENTION, OURS, SDPA, Peer, ours

OUR_OWN = {"implementation": "lightning_attention", "label": "lightning attention"}
FLA = {"implementation": "fla", "label": "flash-linear-attention"}
SHAPE = {"B": 4, "T": 2048, "H": 32, "D": 128, "dtype": "bfloat16"}


@pytest.fixture
def slow_copy(monkeypatch) -> float:
    """A copy rate that is fast to measure and known."""
    monkeypatch.setattr(shapes, "copy_rate", lambda _: 1e9)
    return 1e9


def test_the_floor_of_the_paper_shape():
    """B4 T32768 H32 D128 in two bytes at 4.25 TB/s: 1.01 ms forward and 1.77 ms backward."""
    shape = Shape(4, 32_768, 32, 128)
    assert unit_bytes(shape, torch.bfloat16) == 1 << 30
    assert floor_ms(shape, FORWARD, torch.bfloat16, 4.25e12) == pytest.approx(1.0106, rel=1e-4)
    assert floor_ms(shape, BACKWARD, torch.bfloat16, 4.25e12) == pytest.approx(1.7685, rel=1e-4)
    assert floor_ms(shape, BOTH, torch.bfloat16, 4.25e12) == pytest.approx(2.7791, rel=1e-4)


def test_shapes_gives_floor_memory_and_errors(report, run, slow_copy):
    said = []
    at_work = run(Scale((Shape(2, 96, 2, 16),), torch.bfloat16, 0.01), SDPA[:1])
    at_work.say = said.append
    shapes.measure_shapes(at_work)
    assert report.find("copy") == [{"suite": "copy", "bytes_per_second": slow_copy}]

    (errors,) = report.find("errors")  # none for softmax attention, which is another function
    assert errors["implementation"] == OURS
    assert all(1e-4 < errors[name] < 5e-3 for name in ("output", "dq", "dk", "dv"))

    records = report.find("shapes")
    assert [(r["implementation"], r["pass"]) for r in records] == [
        (OURS, FORWARD), ("sdpa", FORWARD), (OURS, BACKWARD), (OURS, BOTH), ("sdpa", BOTH),
    ]  # fmt: skip
    unit = 2 * 96 * 2 * 16 * 2
    for r, units in zip(records, (4, 4, 7, 11, 11), strict=True):
        assert r["floor_fraction"] == pytest.approx(units * unit / slow_copy * 1e3 / r["ms"], rel=1e-4)
    both = report.find("shapes", implementation=OURS, **{"pass": BOTH})[0]
    assert both["memory_ratio"] == pytest.approx((both["peak_bytes"] + 4 * unit) / (8 * unit), rel=1e-4)
    assert both["memory_ratio"] > 1
    table, figure = shapes.show(report)
    assert len(table.rows) == 1
    assert [len(panel.lines) for panel in figure.panels] == [2, 2]
    assert len(said) == 1 + 1 + 5  # copy rate, errors, times


@pytest.mark.usefixtures("slow_copy")
def test_long_shapes_leave_softmax_attention_out(report, run, monkeypatch):
    monkeypatch.setattr(shapes, "SOFTMAX_MAX_LENGTH", 64)
    shapes.measure_shapes(run(Scale((Shape(1, 65, 1, 16),), torch.bfloat16, 0.01), SDPA[:1]))
    assert {r["implementation"] for r in report.find("shapes")} == {OURS}


def test_errors_are_small_for_ours_and_large_for_a_wrong_one(cpu):
    problem = Problem(Shape(2, 100, 4, 16), torch.bfloat16, cpu)
    reference = shapes.reference(problem)
    assert reference["output"].shape == (1, 100, 2, 16)  # the last sequence, its first and last head
    good = shapes.errors(problem, ours(), reference)
    assert list(good) == ["output", "dq", "dk", "dv"]
    assert all(1e-4 < error < 5e-3 for error in good.values())

    def load():
        right = ours().attention()
        return lambda q, k, v, log_decay: right(q, k, v, log_decay * 1.05)

    wrong = shapes.errors(problem, Peer("wrong", "wrong", "none", {ATTENTION: load}), reference)
    assert min(wrong.values()) > 5e-3


def test_shapes_table_gives_floor_ratio_memory_and_the_worst_error():
    records = [SHAPE | OUR_OWN | {"pass": pass_, "ms": ms, "floor_fraction": 0.8, "memory_ratio": 1.01}
               for pass_, ms in ((FORWARD, 0.1), (BACKWARD, 0.3), (BOTH, 0.4))]  # fmt: skip
    records += [SHAPE | FLA | {"pass": FORWARD, "ms": 0.25}, SHAPE | FLA | {"pass": BOTH, "error": "OutOfMemoryError"}]
    errors = [
        SHAPE | {"implementation": "lightning_attention", "output": 0.001, "dq": 0.003, "dk": 0.002, "dv": 0.001},
        SHAPE | {"implementation": "fla", "output": 0.001, "dq": "nan", "dk": 0.002, "dv": 0.001},
    ]
    assert next(shapes.table(records, errors)).rows[0] == [
        "4, 2048, 32, 128", "0.100 (0.80)", "0.300 (0.80)", "0.400 (0.80)", "1.010", "0.250 (2.5×)", "failed",
        "3.0e-03", "nan, wrong",
    ]  # fmt: skip


def test_a_peer_is_called_wrong_in_the_passes_that_it_gets_wrong():
    passes = ("forward", "forward+backward")
    records = [{"implementation": name, "label": name, "pass": pass_} for name in ("good", "bad") for pass_ in passes]
    errors = [
        {"implementation": "good", "output": 1e-3, "dq": 1e-3},
        {"implementation": "bad", "output": 1e-3, "dq": "nan"},
        {"implementation": "absent", "error": "no such package"},
    ]
    labels = [r["label"] for r in shapes.marked(records, errors)]
    assert labels == ["good", "good", "bad", "bad, wrong"]


def test_shapes_of_equal_width_make_a_figure_of_lengths():
    def shape(B: int, T: int, H: int = 32, D: int = 128, **values: object) -> dict:
        return {"B": B, "T": T, "H": H, "D": D, **values}

    wanted = [shape(4, 32768, ms=1), shape(1, 131072, ms=2), shape(4, 2048, ms=3)]
    others = [shape(1, 2048, ms=4), shape(1, 131072, H=8, ms=5), shape(1, 524288, D=64, ms=6)]
    others.append(shape(8, 2048, error="x"))
    assert shapes.by_length([*wanted, *others]) == wanted
