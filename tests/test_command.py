"""The start of the command: what is set before PyTorch is loaded, and what is said where something is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def start(*command: str, **environment: str) -> subprocess.CompletedProcess:
    # An editable installation has a copy of the module that starts the command.
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    if "OMP_WAIT_POLICY" not in environment:
        variables.pop("OMP_WAIT_POLICY", None)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP says what it was told")
@pytest.mark.parametrize("module", ["lightning_attention_command", "lightning_attention.cli"])
@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(module, given, policy):
    """What the OpenMP that PyTorch brings has read, not what stands in the environment."""
    done = start("-m", module, "--version", OMP_DISPLAY_ENV="true", **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lightning-attention ")
    found = re.findall(r"OMP_WAIT_POLICY = '(\w+)'", done.stderr)
    assert found, "no OpenMP was loaded"
    assert found[-1] == policy


def test_the_console_script_is_that_start():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'lightning-attention = "lightning_attention_command:main"' in text
    program = "import sys, lightning_attention_command; sys.exit('torch' in sys.modules)"
    assert start("-c", program).returncode == 0


@pytest.mark.parametrize("missing", ["typer", "transformers"])
def test_without_its_extras_it_says_how_to_get_them(missing, tmp_path):
    # As if it were not installed: None in sys.modules makes an import fail as a missing module does.
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from lightning_attention_command import main;"
        f"main(['train', '--out', {str(tmp_path / 'run')!r}])"
    )
    done = start("-c", program)
    assert done.returncode == 1
    assert done.stderr == f"error: this needs {missing}: pip install 'lightning-attention[all]'\n"


def test_check_needs_nothing_but_pytorch():
    absent = ["typer", "rich", "numpy", "transformers", "tokenizers", "safetensors", "matplotlib", "triton"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); from lightning_attention_command import main;"
        "main(['check'])"
    )
    done = start("-c", program)
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout


def test_a_missing_module_of_our_own_is_not_hidden():
    program = (
        "import sys; sys.modules['lightning_attention.cli.check'] = None; from lightning_attention_command import main;"
        "main(['--version'])"
    )
    assert "ModuleNotFoundError" in start("-c", program).stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
@pytest.mark.parametrize("command", ["train - --out", "generate --prompts - --model"])
def test_without_standard_streams_there_is_nothing_to_read_and_nothing_in_the_way(command, tmp_path):
    shell = 'm="$1"; shift; exec "$m" -m lightning_attention_command "$@" <&- >&-'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, *command.split(), str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
