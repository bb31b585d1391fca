"""What importing the package costs, and what it offers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_attention

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_public_names():
    assert sorted(lightning_attention.__all__) == [
        "INVARIANT_CHUNK",
        "LightningOutput",
        "QuantizedStates",
        "RecentTokens",
        "decay",
        "lightning_attention",
        "lightning_attention_commit",
        "lightning_attention_decode",
        "lightning_attention_fold",
        "lightning_attention_prefill",
        "lightning_attention_verify",
        "trees",
    ]
    for name in lightning_attention.__all__:
        assert getattr(lightning_attention, name).__doc__, name


def test_the_version_is_the_same_everywhere():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    cited = re.findall(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    assert [project["version"], *cited] == [lightning_attention.__version__] * 2


def test_importing_it_adds_little_to_torch():
    """Under 0.3 s, and no other package; what torch itself imports is there before."""
    program = (
        "import sys, torch; before = set(sys.modules); import lightning_attention;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before});"
        "print(*sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=True
    )
    added, loaded = (set(line.split()) for line in run.stdout.splitlines())
    assert added - set(sys.stdlib_module_names) <= {"lightning_attention", "torch"}
    assert not loaded & {"transformers", "matplotlib", "triton"}
    (microseconds,) = re.findall(r"\| +(\d+) \| lightning_attention$", run.stderr, re.MULTILINE)
    assert int(microseconds) < 300_000


@pytest.mark.parametrize("room", ["nn", "serving"])
def test_layers_and_serving_do_not_need_transformers(room: str):
    code = f"import sys, lightning_attention.{room}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_lowest_versions_tested_are_the_lowest_allowed():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    allowed = {}
    for requirement in map(Requirement, asked):
        bounds = {s.operator: s.version for s in requirement.specifier}
        # Itself, what lints, and Python 3.10's.
        if requirement.name not in ("lightning-attention", "ruff", "mypy", "import-linter", "tomli"):
            allowed[requirement.name] = bounds
    lines = (root / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert Version(allowed["torch"][">="]) <= Version(pinned["torch"])  # no small build of an older one
    for name, bounds in allowed.items():
        assert name == "torch" or Version(pinned[name]) == Version(bounds[">="]), name
    for name in ("torch", "triton", "transformers", "peft", "accelerate"):
        assert Version(pinned[name]) < Version(allowed[name]["<"]), name
