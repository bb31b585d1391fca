"""What importing the package costs, and what it offers."""

import re
import subprocess
import sys

import lightning_attention


def test_public_names():
    assert sorted(lightning_attention.__all__) == [
        "LightningOutput",
        "decay",
        "lightning_attention",
        "lightning_attention_commit",
        "lightning_attention_decode",
        "lightning_attention_prefill",
        "lightning_attention_verify",
    ]
    for name in lightning_attention.__all__:
        assert getattr(lightning_attention, name).__doc__, name


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
