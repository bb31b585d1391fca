import pytest
import torch
from rich.console import Console

from lightning_attention.bench import tables
from lightning_attention.bench.check import Row
from lightning_attention.bench.op import BACKWARD, BOTH, FORWARD

OURS = {"implementation": "lightning_attention", "label": "lightning attention"}
FLA = {"implementation": "fla", "label": "flash-linear-attention"}
SHAPE = {"B": 4, "T": 2048, "H": 32, "D": 128, "dtype": "bfloat16"}


def _text(table) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    return console.export_text()


def _cells(table, row: int) -> list[str]:
    return [list(column.cells)[row] for column in table.columns]


def test_check_table_tells_right_from_wrong():
    rows = [
        Row("cpu", "tiled", torch.bfloat16, "output", "output", 0.001, 0.005),
        Row("cpu", "tiled", torch.bfloat16, "gradients", "dq", 0.01, 0.005),
        Row("cpu", "tiled", torch.bfloat16, "decode", "", float("nan"), float("nan"), "RuntimeError: [no] image"),
    ]
    table = tables.check_table(rows, several_devices=True)
    assert _cells(table, 0) == ["tiled (cpu)", "bfloat16", "output", "output", "1.0e-03", "5.0e-03", "yes"]
    assert _cells(table, 1) == ["tiled (cpu)", "bfloat16", "gradients", "dq", "1.0e-02", "5.0e-03", "NO"]
    assert [r.style for r in table.rows] == [None, "red", "red"]
    assert "RuntimeError: [no] image" in _text(table)


def test_lengths_table_gives_ratios_and_gaps():
    records = []
    for pass_ in (FORWARD, BOTH):
        values = {"pass": pass_, "bytes_per_token": 4096.0}
        records.append(SHAPE | OURS | values | {"ms": 2.0, "us_per_token": 0.25})
        records.append(SHAPE | FLA | values | {"ms": 7.0, "us_per_token": 0.875})
        records.append(SHAPE | OURS | values | {"T": 4096, "ms": 4.0, "us_per_token": 0.25})
        records.append(SHAPE | FLA | {"T": 4096, "pass": pass_, "skipped": "too long"})
    forward, both = tables.lengths_tables(records)
    assert forward.title == "forward, per token"
    assert both.title == "forward+backward, per token"
    assert _cells(forward, 0) == ["2,048", "0.25", "4,096", "0.875", "4,096", "3.5×"]
    assert _cells(forward, 1) == ["4,096", "0.25", "4,096", "–", "", ""]


def test_spread_is_of_ours_from_the_length_on():
    records = [SHAPE | OURS | {"T": T, "pass": FORWARD, "ms": 1.0, "us_per_token": us}
               for T, us in ((2048, 9.0), (8192, 1.0), (16_384, 1.08), (32_768, 1.02))]  # fmt: skip
    records.append(SHAPE | FLA | {"T": 8192, "pass": FORWARD, "ms": 1.0, "us_per_token": 50.0})
    assert tables.spread(records, FORWARD, 8192) == pytest.approx(0.08)
    assert tables.spread(records, BOTH, 8192) is None
    assert tables.constant(records) == ["forward: our time per token from T = 8,192 to 32,768 varies by 8%"]


def test_shapes_table_gives_floor_ratio_memory_and_the_worst_error():
    records = [SHAPE | OURS | {"pass": pass_, "ms": ms, "floor_fraction": 0.8, "memory_ratio": 1.01}
               for pass_, ms in ((FORWARD, 0.1), (BACKWARD, 0.3), (BOTH, 0.4))]  # fmt: skip
    records += [SHAPE | FLA | {"pass": FORWARD, "ms": 0.25}, SHAPE | FLA | {"pass": BOTH, "error": "OutOfMemoryError"}]
    errors = [
        SHAPE | {"implementation": "lightning_attention", "output": 0.001, "dq": 0.003, "dk": 0.002, "dv": 0.001},
        SHAPE | {"implementation": "fla", "output": 0.001, "dq": "nan", "dk": 0.002, "dv": 0.001},
    ]
    assert _cells(tables.shapes_table(records, errors), 0) == [
        "4, 2048, 32, 128", "0.100 (0.80)", "0.300 (0.80)", "0.400 (0.80)", "0.250 (2.5×)", "failed", "1.010",
        "3.0e-03", "nan",
    ]  # fmt: skip


def test_packed_table_compares_with_one_dense_sequence():
    records = [{"H": 8, "packing": packing, "pass": pass_, "ms": ms}
               for packing, ms in (("dense 1 × 512", 1.0), ("skewed", 1.1)) for pass_ in (FORWARD, BOTH)]  # fmt: skip
    table = tables.packed_table(records)
    assert _cells(table, 1) == ["8", "skewed", "1.1000 (1.10)", "1.1000 (1.10)"]


def test_host_table():
    records = [OURS | {"pass": FORWARD, "us": 12.34}, OURS | {"pass": BOTH, "error": "RuntimeError"}]
    assert _cells(tables.host_table(records), 0) == ["lightning attention", "12.3", "failed"]
