"""Every python snippet of the documents runs, on a CPU and without a warning, and every link between them leads.

The commands of the tutorials run too, small; those of the other documents name options that exist.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from lightning_attention.bench import lengths
from lightning_attention.bench.case import Run
from lightning_attention.bench.report import Report, environment
from lightning_attention.cli.app import app, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = [d for d in DOCUMENTS if d.parent.name == "tutorials"]
SMALL = ["--layers", "1", "--width", "32", "--heads", "2", "--vocab-size", "300", "--seq-len", "64"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def snippets(document: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """The snippets in one of the languages, each after as many empty lines as the document has, for tracebacks."""
    text = document.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] in languages:
            yield match[1], "\n" * text.count("\n", 0, match.start(2)) + match[2]


def has_python(document: Path) -> bool:
    return any(snippets(document, "python"))


def commands(code: str) -> Iterator[list[str]]:
    """The words of each call of `lightning-attention`, by itself or under torchrun, that a snippet has."""
    for line in code.replace("\\\n", " ").splitlines():
        called = re.search(r"(?:^(?:\$ )?lightning-attention|-m lightning_attention_command)\b(.*)", line)
        if called:
            yield shlex.split(re.split(r" [>|] ", called[1])[0], comments=True)


def run(document: Path, *languages: str) -> int:
    """Run a document's snippets one after the other, python in one namespace; how many there were."""
    names: dict[str, object] = {"__name__": document.stem}
    found = list(snippets(document, *languages))
    for language, code in found:
        if language == "python":
            exec(compile(code, str(document), "exec"), names)
            continue
        for words in commands(code):
            words = [str(int(w) // 50) if words[i - 1] == "--steps" else w for i, w in enumerate(words)]
            words += SMALL if words[0] == "train" and "--resume" not in words else []
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert ended.value.code in (0, None), words
    return len(found)


def measured(folder: Path) -> None:
    """What ``lightning-attention bench`` leaves, of lengths that take no time."""
    cpu = torch.device("cpu")
    tiny = replace(lengths.SCALES["cpu quick"], lengths=(64, 128), H=2, D=16, seconds=0.01)
    report = Report(folder / "runs/bench/op-lengths-cpu.json", environment(cpu))
    lengths.sweep(Run(report, cpu, tiny, say=len))


# peft 0.21 asks transformers 5.23 by a name that it calls old.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# The examples of distributed.md are programs for several processes: tests/distributed runs them.
@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if d.name != "distributed.md" and has_python(d)],
    ids=lambda d: str(d.relative_to(ROOT)),
)
def test_snippets_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if document.name in ("transformers.md", "fine-tune.md"):
        pytest.importorskip("accelerate")
        pytest.importorskip("peft")
    measured(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(document, "python", *(["bash"] if document in TUTORIALS else [])) > 0


def test_snippets_are_found():
    with_snippets = {d.name for d in DOCUMENTS if has_python(d)}
    assert {"README.md", "algorithm.md", "numerics.md", "serving.md", "benchmarks.md"} <= with_snippets
    assert [d.name for d in TUTORIALS if has_python(d)] == ["fine-tune.md", "layer.md", "serve.md", "train.md"]


def test_a_wrong_snippet_fails_at_its_line(tmp_path: Path):
    document = tmp_path / "wrong.md"
    document.write_text("# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run(document, "python")
    assert caught.traceback[-1].lineno + 1 == 11


def unknown_options(words: list[str]) -> set[str]:
    """The options of a command line that its command does not have."""
    command = typer.main.get_command(app)
    if not words[0].startswith("-"):
        command = command.commands[words[0]]  # type: ignore[attr-defined]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    return {word.partition("=")[0] for word in words if word.startswith("--")} - known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_commands_name_options_that_exist(document: Path):
    for _, code in snippets(document, "", "bash"):
        for words in commands(code):
            assert unknown_options(words) == set(), words


def test_a_wrong_command_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "```bash\n$ lightning-attention train x --stepz 3 \\\n  --out y > log\n```\n"
    document = tmp_path / "wrong.md"
    document.write_text(text)
    monkeypatch.chdir(tmp_path)
    ((_, code),) = snippets(document, "bash")
    (words,) = commands(code)
    assert words == ["train", "x", "--stepz", "3", "--out", "y"]
    assert unknown_options(words) == {"--stepz"}
    with pytest.raises(AssertionError, match="stepz"):
        run(document, "bash")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def features(page: str) -> list[tuple[str, str]]:
    """Each row of the tables beside other libraries: its name, and what stands under "here"."""
    rows: list[tuple[str, str]] = []
    within = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        within = line.startswith("|") and (within or cells[1] == "here")
        if within and cells[1] != "here" and set(cells[1]) != {"-"}:
            rows.append((cells[0], cells[1]))
    return rows


def unproven(page: str) -> list[str]:
    """The rows of which "here" is not a link to a file of tests, or, of what there is not, to the limitations."""
    return [
        name
        for name, here in features(page)
        if not (link := re.fullmatch(r"\[([^]]+)\]\(([^)]+)\)", here))
        or (link[1] == "no") != (link[2] == "#limitations")
        or (link[1] != "no" and not ((ROOT / link[2]).is_file() and re.match(r"tests/.*test_\w+\.py$", link[2])))
    ]


def test_every_feature_leads_to_its_test():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(features(page)) >= 18
    assert unproven(page) == []


def test_a_feature_without_a_test_is_found():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    decode, states = "| [yes](tests/ops/test_decode.py)", "| [yes](tests/ops/test_quantized.py)"
    for wrong in ("| yes", "| [yes](tests/ops/test_none.py)", "| [yes](README.md)", "| [yes](#limitations)"):
        assert unproven(page.replace(decode, wrong)) == ["decode from a pool of states, by slot"], wrong
    assert unproven(page.replace(states, "| [no](tests/ops/test_quantized.py)")) == ["states in 8 bits"]


def has_code(file: Path) -> bool:
    """Whether there is more in it than a docstring."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    return len(module.body) > (ast.get_docstring(module) is not None)


def unnamed(page: str) -> set[str]:
    """The python files of the package and the benchmarks that the page has no link to."""
    named = {(ARCHITECTURE.parent / target).resolve() for target in LINK.findall(page)}
    files = [file for folder in ("src", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    return {str(file.relative_to(ROOT)) for file in files if has_code(file) and file.resolve() not in named}


def misnamed(page: str) -> list[str]:
    """The names of python files on the page that are no link, or a link to a file of another name."""
    links = re.compile(r"\[([^]]+)\]\(([^)#:]+)\)")
    wrong = [
        label
        for label, target in links.findall(page)
        if label.endswith(".py") and not target.endswith(f"/{label}".replace("\\", ""))
    ]
    return wrong + re.findall(r"[\w/]+\.py\b", links.sub("", page))


def test_the_architecture_names_every_file():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    assert unnamed(page) == set()
    assert misnamed(page) == []  # that links lead to a file, the test before this one says


def test_a_file_left_out_or_misnamed_is_found():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    without = "\n".join(line for line in page.splitlines() if "ops/transforms.py" not in line)
    assert unnamed(without) == {"src/lightning_attention/ops/transforms.py"}
    assert misnamed(page.replace("[transforms.py]", "[launch.py]")) == ["launch.py"]
    assert misnamed(f"{page}\n`launcher.py`") == ["launcher.py"]
