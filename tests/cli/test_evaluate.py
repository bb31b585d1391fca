import io
import json

import pytest

from tests.training.tiny import tiny_settings, train, write_text


@pytest.fixture(scope="module", params=["transnormer", "llama"])
def trained(request, tmp_path_factory):
    """The outcome of a run of each kind, in whose folder there is a text."""
    return train(tiny_settings(tmp_path_factory.mktemp(request.param), model=request.param, steps=2))[1]


def text_of(trained):
    return trained.checkpoint.parents[2] / "text.txt"


def test_json_and_table_say_the_same(run, trained, tmp_path):
    command = ["evaluate", trained.checkpoint, text_of(trained), "--seq-len", "64", "--device", "cpu"]
    out_file = tmp_path / "new" / "loss.json"
    status, out, err = run(*command, "--json", "--out", out_file)
    assert status == 0, err
    assert err.startswith("read 1 file: 1 utf-8")
    record = json.loads(out)
    assert json.loads(out_file.read_text()) == record
    assert record["kind"] == trained.checkpoint.parents[2].name.rstrip("0123456789")
    assert (record["seq_len"], record["stride"], record["documents"]) == (64, 63, 1)
    assert record["text_bytes"] == text_of(trained).stat().st_size
    assert (record["device"], record["precision"]) == ("cpu", "float32")
    spans = [(bucket["first"], bucket["last"]) for bucket in record["by_position"]]
    assert spans == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
    status, out, err = run(*command)
    assert status == 0, err
    assert f"{record['bits_per_byte']:.4f} bits per byte of {record['text_bytes']:,} bytes in 1 documents" in out
    for bucket in record["by_position"]:
        assert f"{bucket['loss']:.4f}" in out
    assert "32 to 63" in out


def test_a_run_an_exported_folder_and_standard_input(run, trained, tmp_path, monkeypatch):
    command = ["--seq-len", "32", "--json", "--device", "cpu"]
    whole = json.loads(run("evaluate", trained.checkpoint, text_of(trained), *command)[1])
    assert run("export", trained.checkpoint, tmp_path / "model")[0] == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text_of(trained).read_bytes())))
    for model, text in ((trained.checkpoint.parents[1], text_of(trained)), (tmp_path / "model", "-")):
        record = json.loads(run("evaluate", model, text, *command)[1])
        assert (record["loss"], record["by_position"]) == (whole["loss"], whole["by_position"])


def test_bad_input_is_one_line_and_a_status(run, trained, tmp_path):
    text = text_of(trained)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((trained.checkpoint / "config.json").read_text())
    for arguments, message in {
        (tmp_path / "missing", text): "no such folder: ",
        (tmp_path / "bare", text): "cannot load the model in ",
        (trained.checkpoint, "missing.txt"): "no such file or folder: missing.txt",
        (trained.checkpoint, tmp_path / "empty.txt"): "there is no text in ",
        (trained.checkpoint, text, "--stride", "2000"): "stride must be from 1 to 1023",
        (trained.checkpoint, text, "--encoding", "klingon"): "encoding must be auto or the name of",
        (trained.checkpoint, text, "--precision", "fp8"): "precision must be one of auto, bf16, float32",
        (trained.checkpoint, text, "--device", "cuda:77"): "device cuda:77 is not there",
    }.items():
        status, out, err = run("evaluate", *arguments)
        assert (status, out) == (2, "")
        assert err.splitlines()[-1].startswith(f"error: {message}")
        assert "Traceback" not in err
    assert run("evaluate", trained.checkpoint)[0] == 2  # without a text


def test_jsonl_takes_its_field(run, trained, tmp_path):
    lines = write_text(tmp_path / "text.txt", 60).read_text(encoding="utf-8").splitlines()
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    command = ["evaluate", trained.checkpoint, tmp_path / "texts.jsonl", "--json", "--device", "cpu"]
    record = json.loads(run(*command, "--text-field", "body")[1])
    assert record["text_bytes"] == sum(len(line.encode()) for line in set(lines))
    assert record["documents"] == len(set(lines))
    status, _, err = run(*command)
    assert status == 2
    assert "without a field 'text' in line 1 (--text-field): it has 'body'" in err
