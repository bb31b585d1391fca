"""Every python snippet of the documents runs, on a CPU and without a warning, and every link between them leads."""

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_attention.bench import lengths
from lightning_attention.bench.case import Run
from lightning_attention.bench.report import Report, environment

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def snippets(document: Path) -> Iterator[str]:
    """The snippets, each with as many empty lines before it as there are in the document, for tracebacks."""
    text = document.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


def run(document: Path) -> int:
    """Run a document's snippets one after the other, in one namespace; how many there were."""
    names: dict[str, object] = {"__name__": document.stem}
    codes = list(snippets(document))
    for code in codes:
        exec(compile(code, str(document), "exec"), names)
    return len(codes)


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
    "document", [d for d in DOCUMENTS if d.name != "distributed.md" and any(snippets(d))], ids=lambda d: d.name
)
def test_snippets_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if document.name == "transformers.md":
        pytest.importorskip("accelerate")
        pytest.importorskip("peft")
    measured(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(document) > 0


def test_snippets_are_found():
    with_snippets = {d.name for d in DOCUMENTS if any(snippets(d))}
    assert {"README.md", "algorithm.md", "numerics.md", "serving.md", "benchmarks.md"} <= with_snippets


def test_a_wrong_snippet_fails_at_its_line(tmp_path: Path):
    document = tmp_path / "wrong.md"
    document.write_text("# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run(document)
    assert caught.traceback[-1].lineno + 1 == 11


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path):
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


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
