import torch

from benchmarks.cases import numerics
from benchmarks.figures import numerics as numerics_figure
from lightning_attention import lightning_attention
from lightning_attention.bench.case import Run
from lightning_attention.bench.peers import ATTENTION, Peer
from lightning_attention.bench.report import Report
from lightning_attention.check import relative_error


def test_the_naive_recurrence_is_the_definition_in_float64():
    q, k, v = torch.randn(3, 2, 40, 3, 16, dtype=torch.float64)
    log_decay = torch.tensor([-0.01, -0.5, -8.0])
    exact = lightning_attention(q, k, v, log_decay, backend="reference").output
    found = numerics.naive(q, k, v, log_decay.double())
    assert relative_error(found, exact) < 1e-12
    assert relative_error(numerics.naive(q, k, v, log_decay.double() * 1.001), exact) > 1e-6


def test_peers_stand_beside_it(tmp_path):
    def heads_first(q, k, v, log_decay):
        return numerics.naive(*(x.transpose(1, 2) for x in (q, k, v)), log_decay).transpose(1, 2)

    def broken():
        raise ModuleNotFoundError("no such package")

    peers = [
        Peer("heads", "heads first", "p", {ATTENTION: lambda: heads_first}, heads_first=True),
        Peer("absent", "absent", "p", {ATTENTION: broken}),
        Peer("softmax", "softmax", "p", {ATTENTION: broken}, softmax=True),
    ]
    report = Report(tmp_path / "x.json", {})
    scale = numerics.Scale((100,), (-0.1, -8.0), 16, (torch.float32,))
    numerics.measure(Run(report, torch.device("cpu"), scale, peers, say=len))
    found = [r["relative_error"] for r in report.find("numerics", implementation="heads")]
    assert found == [r["relative_error"] for r in report.find("numerics", implementation="naive")]
    (table,) = numerics.show(report)
    assert {row[-1] for row in table.rows} == {"failed"}
    assert not report.find("numerics", implementation="softmax")
    numerics_figure.draw(tmp_path / "n.svg", report)
    assert "heads first" in (tmp_path / "n.svg").read_text()


def test_each_head_has_the_error_of_its_decay(tmp_path):
    report = Report(tmp_path / "x.json", {})
    scale = numerics.Scale((300,), (-1e-3, -8.0), 16, (torch.bfloat16,))
    numerics.measure(Run(report, torch.device("cpu"), scale, say=len))
    naive = {r["log_decay"]: r["relative_error"] for r in report.find("numerics", implementation="naive")}
    ours = [r["relative_error"] for r in report.find("numerics", implementation="lightning_attention")]
    assert naive[-1e-3] > 10 * naive[-8.0]  # roundings add up where little fades
    assert max(ours) < 2.5e-3
    (table,) = numerics.show(report)
    assert [row[:3] for row in table.rows] == [["bfloat16", "300", "-0.001"], ["bfloat16", "300", "-8"]]
