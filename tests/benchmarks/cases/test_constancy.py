import torch

from benchmarks.cases import constancy
from lightning_attention.bench.lengths import Sweep


def test_constancy_keeps_tokens_and_heads():
    sweep = constancy.SCALES["cuda"]
    assert (sweep.H, sweep.D, sweep.tokens) == (16, 128, 1_048_576)
    assert sweep.lengths == (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
    assert sweep.dtype == torch.bfloat16


def test_ours_alone_takes_part_unless_peers_are_named():
    assert constancy.CASE.peers == ()


def test_records_and_shows_a_suite_of_its_own(report, run):
    tiny = Sweep((4096, 8192), H=1, D=16, dtype=torch.float32, tokens=8192, limit_s=1, seconds=0.01)
    constancy.CASE.measure(run(tiny))
    assert {(r["suite"], r["B"], r["T"]) for r in report.records} == {("constancy", 2, 4096), ("constancy", 1, 8192)}
    forward, both, *sentences, figure = constancy.CASE.show(report)
    assert len(forward.rows) == len(both.rows) == len(sentences) == 2
    assert "B·T = 8,192" in figure.caption
