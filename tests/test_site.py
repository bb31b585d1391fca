"""The documentation as a site: links out of docs/, the strict build, an entry for every public name."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_attention
from lightning_attention import nn, serving
from lightning_attention.models import transnormer

ROOT = Path(__file__).parents[1]


def load_site():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = load_site()
URL = "https://git.example/x/blob/main"


@pytest.mark.parametrize(
    ("page", "text", "without", "on_a_host"),
    [
        ("docs/a.md", "[x](b.md#c)", "[x](b.md#c)", "[x](b.md#c)"),
        ("docs/start/a.md", "[x](../b.md)", "[x](../b.md)", "[x](../b.md)"),
        ("docs/a.md", "[x](#c) [y](https://z/w.md)", "[x](#c) [y](https://z/w.md)", "[x](#c) [y](https://z/w.md)"),
        (
            "docs/start/a.md",
            "[changes](../../CHANGELOG.md)",
            "[changes](../changelog.md)",
            "[changes](../changelog.md)",
        ),
        ("CHANGELOG.md", "[x](docs/serving.md#y)", "[x](serving.md#y)", "[x](serving.md#y)"),
        (
            "docs/start/a.md",
            "![f](../../benchmarks/results/f.png)",
            "![f](../benchmarks/results/f.png)",
            "![f](../benchmarks/results/f.png)",
        ),
        (
            "docs/a.md",
            r"[ops/\_\_init\_\_.py](../src/ops/__init__.py)",
            '`ops/__init__.py`{ title="src/ops/__init__.py" }',
            rf"[ops/\_\_init\_\_.py]({URL}/src/ops/__init__.py)",
        ),
        ("docs/a.md", "[the list](../src/y.py)", "the list (`src/y.py`)", f"[the list]({URL}/src/y.py)"),
        ("docs/a.md", "`[x](../src/y.py)`", "`[x](../src/y.py)`", "`[x](../src/y.py)`"),
    ],
)
def test_links_are_turned(page: str, text: str, without: str, on_a_host: str):
    assert site.resolve(text, page, None) == without
    assert site.resolve(text, page, URL) == on_a_host


def test_docstrings_become_pages():
    html = "see :class:<code>~lightning_attention.nn.LRPE</code>, :mod:<code>lightning_attention.decay</code>,"
    html += " <code>~x.y</code>"
    wanted = "see <code>LRPE</code>, <code>lightning_attention.decay</code>, <code>~x.y</code>"
    assert site.of_docstrings(html, "../") == wanted
    assert site.of_docstrings("(docs/serving.md)", "../../") == '(<a href="../../serving/">docs/serving.md</a>)'


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_lists_nest_by_four_spaces(page: Path):
    """A Git host takes fewer; the site would make them items of the outer list."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^ {1,3}(?:-|\d+\.) .*", text, re.MULTILINE) == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: no link leads nowhere, no page is left out of the navigation."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (pip install '.[docs]')")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def public_names() -> Iterator[str]:
    for module in (lightning_attention, nn, serving):
        yield from (f"{module.__name__}.{name}" for name in module.__all__)
    yield from (
        f"{transnormer.__name__}.{name}" for name in transnormer.__all__ if name != "TransnormerPreTrainedModel"
    )
    yield "lightning_attention.models.preset"


def test_every_public_name_is_in_the_reference(built: Path):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (built / "reference").rglob("*.html"))
    entries = {name.rpartition(".")[2] for name in re.findall(r'<h[23] id="([\w.]+)"', pages)}
    words = set(re.findall(r"<code>(\w+)</code>", pages))
    names = {name.rpartition(".")[2] for name in public_names()}
    modules = {"decay", "trees"}  # a page and a section
    assert names - modules - entries - words == set()
    assert "INVARIANT_CHUNK" in words
    assert {"forward", "step", "prefill", "verify", "commit"} <= entries  # what layers inherit
    assert not re.findall(r":(?:class|func|meth|mod):", pages)
    linked = set(re.findall(r'href="(?:\.\./)+(\w+)/">docs/', pages))
    assert linked
    assert all((built / page / "index.html").exists() for page in linked)


def test_what_lies_outside_of_docs_is_there(built: Path):
    for page in ("changelog", "contributing"):
        assert (built / page / "index.html").exists()
    figures = set(re.findall(r'src="[./]*(benchmarks/results/[^"]+)"', (built / "performance/index.html").read_text()))
    assert figures
    assert all((built / name).exists() for name in figures)
    assert not list(built.rglob("*.py"))
