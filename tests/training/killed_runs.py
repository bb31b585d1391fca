"""Runs training in child processes that die by SIGKILL, resumes them, and checks that nothing can be told apart.

A script of its own: it imports torch once and forks a child for every life of a run, which is only safe in a process
that has started no threads.
"""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_attention.models.pretrained import load_model
from lightning_attention.training import checkpoint, trainer
from lightning_attention.training.config import make_config
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.saving import OPTIMIZER
from lightning_attention.training.trainer import Trainer
from tests.training.tiny import tiny_settings

SETTINGS = {"steps": 3, "save_every": 2, "eval_every": 2, "eval_tokens": 40, "keep": 1, "layers": 1}


def child(life: Callable[[], None]) -> int:
    """Start a process that does `life` and nothing else; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            life()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def died(pid: int) -> bool:
    """Wait for a child: True when it was killed, False when it finished. Anything else is an error."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "training failed"
    return False


def train(root: Path, out: Path) -> None:
    trainer.plot_loss = lambda records, path: None  # would be most of the time, and no part of what is resumed
    Trainer(make_config(tiny_settings(root, out=str(out), **SETTINGS)), resume="auto").fit()


def count_events(action: Callable[[int], None]) -> None:
    """Call `action` with 1, 2, ... before every operation on which wholeness may hang."""
    count = 0

    def counted(operation: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            action(count)
            return operation(*args, **kwargs)

        return call

    checkpoint.save_state = counted(checkpoint.save_state)
    checkpoint._sync = counted(checkpoint._sync)
    checkpoint.os.rename = counted(os.rename)
    checkpoint.os.replace = counted(os.replace)
    checkpoint.os.unlink = counted(os.unlink)  # what rmtree deletes files with


def live_until(event: int, root: Path, out: Path) -> None:
    count_events(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == event else None)
    train(root, out)


def curve(out: Path) -> list[dict]:
    """The record of a run without its clock."""
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(out / "metrics.jsonl")]


def assert_checkpoints_are_whole(out: Path) -> None:
    for folder in checkpoint.checkpoints(out / "checkpoints"):
        assert checkpoint.load_state(folder)["step"] == int(folder.name.removeprefix("step_"))
        load_model(folder)


def assert_same(out: Path, reference: Path) -> None:
    assert curve(out) == curve(reference), f"{out.name}: another loss curve"
    (folder,), (wanted,) = (checkpoint.checkpoints(path / "checkpoints") for path in (out, reference))
    assert folder.name == wanted.name
    assert (folder / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    optimizer = f"{OPTIMIZER}/__0_0.distcp"
    assert (folder / optimizer).read_bytes() == (wanted / optimizer).read_bytes()
    ours, theirs = checkpoint.load_state(folder), checkpoint.load_state(wanted)
    assert torch.equal(ours["learner"]["rng"]["cpu"], theirs["learner"]["rng"]["cpu"])
    leftovers = list(out.rglob("*" + checkpoint.UNFINISHED))
    assert not leftovers, leftovers


def main(root: Path) -> None:
    torch.set_num_threads(1)
    reference = root / "reference"

    def count_reference() -> None:
        count_events(lambda count: (root / "events").write_text(str(count)))
        train(root, reference)

    assert not died(child(count_reference))
    events = int((root / "events").read_text())
    assert len(curve(reference)) == 3 + 3  # every step, and validations at 0, 2 and 3

    # Killed before every single operation: in preparing the data, at the start of the record, in both saves and
    # in deleting the checkpoint that is too many.
    for event in range(1, events + 1):
        out = root / "killed"
        assert died(child(lambda: live_until(event, root, out)))  # noqa: B023 (the child runs it at once)
        assert_checkpoints_are_whole(out)
        assert not died(child(lambda: train(root, out)))  # noqa: B023
        assert_same(out, reference)
        shutil.rmtree(out)

    # Killed from outside wherever it happens to be, three times in one run.
    out = root / "shot"
    for lines in (1, 3, 5):
        pid = child(lambda: train(root, out))
        while len(read_metrics(out / "metrics.jsonl")) < lines:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        died(pid)
        assert_checkpoints_are_whole(out)
    assert not died(child(lambda: train(root, out)))
    assert_same(out, reference)
    print(f"{events} deaths inside operations")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
