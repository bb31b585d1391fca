import io
import json
import shutil
import sys

import pytest

from lightning_attention.cli.app import main
from lightning_attention.training.checkpoint import STATE_FILE
from tests.training.tiny import tiny_settings, train


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    _, outcome = train(tiny_settings(tmp_path_factory.mktemp("run"), steps=20, eval_every=0, save_every=0))
    return outcome.checkpoint


@pytest.fixture
def run(run, checkpoint_folder):
    """Call `generate` on the model."""
    own = ("--max-tokens", "12", "--ignore-eos")
    return lambda *args, model=checkpoint_folder: run("generate", "--model", model, *own, *args)


def pipe(monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def test_continues_a_prompt_with_or_without_saying_it(run):
    status, out, err = run("the state")
    assert status == 0, err
    assert out.startswith("the state")
    assert len(out) > len("the state") + 5
    assert out.endswith("\n")
    assert run("the state", "--no-echo")[1] == out.removeprefix("the state")


def test_a_llama_writes_too(run, prompts_file, tmp_path):
    llama = train(tiny_settings(tmp_path, model="llama", steps=20, eval_every=0, save_every=0))[1].checkpoint
    alone = run("the state", model=llama)[1]
    assert alone.startswith("the state")
    assert len(alone) > len("the state") + 5
    texts = run("attention", "the state", "--seed", "1", "--no-echo", model=llama)[1]
    status, out, err = run("--prompts", prompts_file({"prompt": "the state"}, {"prompt": "a " * 200}), model=llama)
    assert status == 0, err
    lines = {line["id"]: line["text"] for line in map(json.loads, out.splitlines())}
    assert "the state" + lines[1] + "\n" == alone
    assert run("the state", "--seed", "2", "--no-echo", model=llama)[1] == texts.split("===\n")[2]


def test_the_seed_decides(run):
    first = run("the", "--seed", "3")[1]
    assert first == run("the", "--seed", "3")[1]
    assert first != run("the", "--seed", "4")[1]
    assert run("the", "--temperature", "0", "--seed", "3") == run("the", "--temperature", "0", "--seed", "4")


def test_several_prompts_come_out_one_after_another(run):
    alone = [run(prompt, "--seed", str(i))[1] for i, prompt in enumerate(["the", "attention naïve 漢字", "a"])]
    out = run("the", "attention naïve 漢字", "a")[1]
    assert out == "".join(f"=== {i} of 3 ===\n{text}" for i, text in enumerate(alone, 1))


def test_reads_standard_input(run, monkeypatch):
    wanted = run("the state")[1]
    pipe(monkeypatch, "the state")
    assert run("-")[1] == wanted
    pipe(monkeypatch, "\ufeffthe state")  # with a byte order mark
    assert run()[1] == wanted


def test_writes_while_it_generates(run, monkeypatch):
    writes = []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "flush", lambda: writes.append(stream.getvalue()), raising=False)
    monkeypatch.setattr("sys.stdout", stream)
    assert run("the")[0] == 0
    assert writes[0] == "the"
    assert len({*writes}) > 6  # most of the 12 tokens are a piece of text of their own


@pytest.fixture
def prompts_file(tmp_path):
    """Write lines, objects or plain text, to a file of prompts."""

    def write(*lines: object) -> str:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return str(path)

    return write


def test_a_file_of_prompts_gives_each_its_line_as_it_ends(run, prompts_file):
    asked = [
        {"prompt": "the state"},
        {"prompt": "attention naïve 漢字", "id": "kanji", "max_tokens": 3},
        "",
        {"prompt": "", "temperature": 0, "seed": 8},
        {"prompt": "the state", "seed": 0, "top_p": 0.95, "id": 77},
        {"prompt": "a " * 300, "max_tokens": 1},
    ]
    status, out, err = run("--prompts", prompts_file(*asked), "--max-batch", "2")
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["id"] for line in lines] == ["kanji", 1, 4, 6, 77]
    found = {line["id"]: line for line in lines}
    assert [(line["tokens"], line["finish_reason"]) for line in lines] == [
        (3, "length"), (12, "length"), (12, "length"), (1, "length"), (12, "length"),
    ]  # fmt: skip
    assert found[77]["text"] == found[1]["text"]
    alone = {
        1: ("the state", "--seed", "0"),
        "kanji": ("attention naïve 漢字", "--seed", "1", "--max-tokens", "3"),
        4: ("", "--temperature", "0"),
    }
    for identity, arguments in alone.items():
        assert found[identity]["text"] + "\n" == run(*arguments, "--no-echo")[1]
    assert "5 prompts, 40 tokens, " in err
    assert len(err.splitlines()) == 1


def test_prompts_come_from_standard_input_too(run, prompts_file, monkeypatch):
    pipe(monkeypatch, '\ufeff{"prompt": "the"}\n{"prompt": "of"}\n')
    piped = run("--prompts", "-")[1]
    assert piped == run("--prompts", prompts_file({"prompt": "the"}, {"prompt": "of"}))[1]
    assert len(piped.splitlines()) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 'a'}", "line 2 is not JSON: Expecting property name"),
        ('["a"]', """line 2 is ["a"]; wanted is an object, {"prompt": "..."}"""),
        ("{}", "line 2: prompt is missing; it must be a string"),
        ({"prompt": ["a"]}, """line 2: prompt is ["a"]; it must be a string"""),
        ({"prompt": "a", "max_tokens": 0}, "line 2: max_tokens is 0; it must be a whole number, 1 or more"),
        ({"prompt": "a", "max_tokens": True}, "line 2: max_tokens is true; it must be a whole number, 1 or more"),
        ({"prompt": "a", "temperature": -1}, "line 2: temperature is -1; it must be a number, 0 or more"),
        ({"prompt": "a", "temperature": float("nan")}, "line 2: temperature is NaN; it must be a number, 0 or more"),
        ({"prompt": "a", "top_p": "1"}, """line 2: top_p is "1"; it must be a number from 0 to 1"""),
        ({"prompt": "a", "seed": 1 << 63}, "line 2: seed is 9223372036854775808; it must be a whole number, 0 or more"),
        (
            {"prompt": "a", "temprature": 1},
            """line 2: there is no field "temprature"; the fields are prompt, id, max""",
        ),
        ({"prompt": "a", "id": 1}, "line 2: id is 1, as in line 1; each must be another"),
        ({"prompt": "a", "id": None}, "line 2: id is null; it must be a string or a whole number"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_generated(run, prompts_file, line, message):
    status, out, err = run("--prompts", prompts_file({"prompt": "the"}, line))
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_files_of_prompts_that_cannot_be_read(run, tmp_path, prompts_file):
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xff"}\n')
    for path, message in {
        tmp_path / "missing": "No such file",
        tmp_path: "Is a directory",
        tmp_path / "latin": "can't decode byte 0xff",
        prompts_file("", " "): 'has no prompts; a line is like {"prompt": "Once upon a time"}',
    }.items():
        status, out, err = run("--prompts", str(path))
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
    status, _, err = run("the", "--prompts", str(tmp_path / "latin"))
    assert status == 2
    assert "give either PROMPT or --prompts" in err


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), KeyboardInterrupt()])
def test_a_reader_that_leaves_and_an_interrupt_end_it_quietly(run, prompts_file, monkeypatch, error):
    stream = io.StringIO()

    def flush() -> None:
        if len(stream.getvalue().splitlines()) == 2:
            raise error

    monkeypatch.setattr(stream, "flush", flush, raising=False)
    monkeypatch.setattr("sys.stdout", stream)
    status, _, err = run("--prompts", prompts_file(*[{"prompt": "the"}] * 9), "--max-batch", "1")
    assert status == (1 if isinstance(error, OSError) else 130)
    assert "Traceback" not in err
    first, second = map(json.loads, stream.getvalue().splitlines())  # what had ended is there, whole
    assert (first["id"], second["id"]) == (1, 2)


def test_a_run_its_checkpoint_and_a_plain_hugging_face_folder_are_one(run, checkpoint_folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint_folder, plain)
    (plain / STATE_FILE).unlink()
    wanted = run("the", model=checkpoint_folder)
    assert wanted[0] == 0
    assert run("the", model=plain) == wanted
    assert run("the", model=checkpoint_folder.parent.parent) == wanted


def test_bad_models_are_one_line_and_a_status(run, tmp_path):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing": "error: no such folder: ",
        "empty": "holds no model: neither a config.json nor checkpoints",
        "gpt2": "holds a gpt2; this needs a transnormer",
    }.items():
        status, out, err = run("the", model=tmp_path / name)
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1


def test_prompts_that_are_no_text(run, monkeypatch, tmp_path):
    for prompt in ("a\udcff", "\ud800"):
        status, out, err = run("fine", prompt)
        assert (status, out) == (2, "")
        assert err.startswith("error: prompt 2 is not Unicode text: ")
        assert "typed or stored as UTF-8" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve"), encoding="utf-8"))
    status, _, err = run("-")
    assert status == 2
    assert err == "error: standard input is not UTF-8: invalid continuation byte at byte 2\n"
    file = tmp_path / "prompts.jsonl"
    for line, message in {
        b'{"prompt": "\\ud800"}': 'line 1: prompt is "\\ud800"; it must be a string, in Unicode',
        b'{"prompt": "a", "id": "\\udfff"}': "line 1: id is ",
        b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}": "line 1: temperature is 1000",
        b'{"prompt": "a", "max_tokens": 99999999999999}': "line 1: max_tokens is 99999999999999",
        b"[" * 100_000: "line 1 is not JSON: ",
        b'{"prompt": "\xff"}': "cannot read the prompts in ",
    }.items():
        file.write_bytes(line)
        status, _, err = run("--prompts", str(file))
        assert status == 2
        assert message in err
        assert err.count("\n") == 1


def test_output_that_knows_few_characters(checkpoint_folder, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    pipe(monkeypatch, '{"prompt": "a", "id": "漢🙂"}')
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--model", str(checkpoint_folder), "--max-tokens", "3", "--prompts", "-"])
    assert not caught.value.code
    sys.stdout.flush()
    assert json.loads(written.getvalue())["id"] == "漢🙂"
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--model", str(checkpoint_folder), "--max-tokens", "3", "漢"])
    assert not caught.value.code
    sys.stdout.flush()
    assert b"\\u6f22" in written.getvalue()
