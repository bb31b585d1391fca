import pytest

from lightning_attention.errors import InputError
from lightning_attention.training.metrics import MetricsLog, read_metrics
from lightning_attention.training.plot import plot_loss


def test_resume_cuts_the_record_at_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(5):
        log.write({"step": step, "loss": 1 / (step + 1)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
    resumed = MetricsLog(path, resume_step=2)
    resumed.write({"step": 3, "loss": 0.1 + 0.2})
    resumed.close()
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]
    assert read_metrics(path)[-1]["loss"] == 0.1 + 0.2  # every bit of a float is kept


def test_a_new_run_starts_a_new_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("line", [b"\0\0\0", b"hello", b"[1]", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_record_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"line 2 of .*metrics.jsonl is damaged; delete it, or the file"):
        MetricsLog(path, resume_step=5)
    assert path.read_bytes().startswith(b'{"step": 1}')


def test_plot_shows_both_curves(tmp_path):
    records = [{"step": 0, "tokens": 0, "val_loss": 5.0, "val_bits_per_byte": 3.5}]
    records += [{"step": s, "tokens": 100 * s, "loss": 4.0, "bits_per_byte": 3.0 - s / 10} for s in range(1, 9)]
    both, train_only = tmp_path / "both.png", tmp_path / "train.png"
    plot_loss(records, both)
    plot_loss(records[1:], train_only)
    assert both.read_bytes().startswith(b"\x89PNG")
    assert both.read_bytes() != train_only.read_bytes()
    plot_loss([], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
