"""Runs in several processes on gloo, forked from one that has imported everything and started no threads.

A script of its own, like killed_runs: `python -m tests.training.fleet NAME FOLDER` does what is called NAME below; the
suite has "same", "ends" and "kills". "many_kills" is 20 deaths at places drawn at random, which take minutes.
"""

import errno
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_attention.errors import DiskError, DivergedError, InputError, is_told_elsewhere
from lightning_attention.models.pretrained import load_model
from lightning_attention.training import checkpoint, saving, trainer, weights
from lightning_attention.training.config import make_config
from lightning_attention.training.learner import Learner
from lightning_attention.training.trainer import Trainer
from tests.training.killed_runs import curve
from tests.training.tiny import tiny_settings

PATIENCE = 120.0  # seconds after which processes that should have ended hang
SETTINGS = {"batch_size": 4, "steps": 6, "save_every": 2, "eval_every": 3, "eval_tokens": 200, "keep": 9}
SHARDS_AND_SLICES = {"dp_shard": 2, "sp": 2}
KILLED = -signal.SIGKILL


def fleet(root: Path, ranks: int, life: Callable[[int], Any]) -> list[int]:
    """Start so many processes that do `life(rank)` as one group; how each of them ended."""
    store = root / f"store-{time.monotonic_ns()}"
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            try:
                if ranks > 1:
                    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
                life(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    ends: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(ends) < ranks and time.monotonic() < deadline:
        for pid in set(pids) - ends.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in set(pids) - ends.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(ends) == ranks, "some processes hang"
    return [ends[pid] for pid in pids]


def settings(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    return tiny_settings(root, out=str(root / out), **{**SETTINGS, **changes})


def train(root: Path, out: str, *, report: Callable | None = None, **changes: Any) -> Trainer:
    trainer.plot_loss = lambda records, path: None  # would be most of the time
    run = Trainer(make_config(settings(root, out, **changes)), resume="auto")
    run.fit(report)
    return run


def assert_trained(root: Path, out: str, ranks: int, **changes: Any) -> None:
    ends = fleet(root, ranks, lambda rank: train(root, out, **changes))
    assert ends == [0] * ranks, ends


def assert_same_curve(root: Path, out: str, reference: str) -> None:
    ours, theirs = curve(root / out), curve(root / reference)
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs], out
    for line, wanted in zip(ours, theirs, strict=True):
        for name, value in wanted.items():
            assert abs(line[name] - value) <= 2e-5 * abs(value), (out, wanted["step"], name, line[name], value)


def assert_same(root: Path, out: str, reference: str = "one") -> None:
    """The losses of every step, the norms of gradients, the validations and the last weights are those of one."""
    assert_same_curve(root, out, reference)
    names = [path.name for path in checkpoint.checkpoints(root / reference / "checkpoints")]
    assert [path.name for path in checkpoint.checkpoints(root / out / "checkpoints")] == names
    found, wanted = (load_model(checkpoint.checkpoints(root / path / "checkpoints")[-1]) for path in (out, reference))
    for (name, weight), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert not list((root / out).rglob("*" + checkpoint.UNFINISHED)), out


def same(root: Path) -> None:
    """Meshes of every kind give what one process gives, and go on from each other's checkpoints."""
    assert_trained(root, "one", 1)
    assert_trained(root, "shards_and_slices", 4, **SHARDS_AND_SLICES)
    assert_same(root, "shards_and_slices")

    # In bfloat16 they are near each other, and what is saved is float32.
    for out, ranks in (("half", 1), ("half_sharded", 2)):
        assert_trained(root, out, ranks, precision="bf16", steps=3)
    for line, wanted in zip(curve(root / "half_sharded"), curve(root / "half"), strict=True):
        for name in wanted.keys() & {"loss", "val_loss"}:
            assert abs(line[name] - wanted[name]) <= 0.01 * wanted[name], (line, wanted)
    model = load_model(checkpoint.checkpoints(root / "half_sharded" / "checkpoints")[-1])
    for name, weight in model.named_parameters():
        assert (weight != weight.bfloat16()).float().mean() > 0.5, name

    # Replicas; four passes a step on one process, two on these; everything computed anew in the backward pass; untied.
    apart = {"tie_embeddings": False, "batch_size": 1, "accumulate": 4}
    assert_trained(root, "untied", 1, **apart)
    assert_trained(root, "replicas", 4, dp_replicate=2, sp=2, activation_checkpointing="block", **apart)
    assert_same(root, "replicas", "untied")

    # Another model, sharded and in copies.
    for out, ranks, mesh in (("llama", 1, {}), ("llama_sharded", 2, {}), ("llama_copied", 2, {"dp_replicate": 2})):
        assert_trained(root, out, ranks, steps=3, model="llama", **mesh)
        assert_same_curve(root, out, "llama")

    # A file each, as large models have them.
    def with_small_files(rank: int) -> None:
        weights.FILE_BYTES = 20_000
        train(root, "moved", steps=2, **SHARDS_AND_SLICES)

    assert fleet(root, 4, with_small_files) == [0] * 4
    assert len(list((root / "moved" / "checkpoints" / "step_00000002").glob("model-*-of-*.safetensors"))) > 3
    shutil.rmtree(root / "one")
    assert_trained(root, "one", 1, steps=2)
    for ranks, steps, mesh in ((4, 4, {"dp_shard": 4}), (1, 6, {})):
        assert_trained(root, "one", 1, steps=steps)
        assert_trained(root, "moved", ranks, steps=steps, **mesh)
    assert_same(root, "moved")


def ends(root: Path) -> None:
    """What ends one process ends all, with the reason, and nothing is lost."""

    def told(error: type[Exception], ranks: int, life: Callable[[int], Any]) -> str:
        """What the first rank says; the others raise the same and leave it to the first."""

        def tell(rank: int) -> None:
            with pytest.raises(error) as caught:
                life(rank)
            assert is_told_elsewhere(caught.value) == (rank > 0)
            (root / f"told{rank}").write_text(str(caught.value))

        assert fleet(root, ranks, tell) == [0] * ranks
        texts = {(root / f"told{rank}").read_text() for rank in range(ranks)}
        assert len(texts) == 1, texts
        return texts.pop()

    assert "no such file or folder" in told(InputError, 2, lambda rank: train(root, "none", inputs=["missing.txt"]))
    text = told(InputError, 2, lambda rank: train(root, "none", dp_shard=4))
    assert text == "dp_replicate 1 x dp_shard 4 x sp 1 are 4 processes; 2 were started"
    text = told(InputError, 2, lambda rank: train(root, "none", batch_size=3))
    assert "batch_size x accumulate = 3 windows; it must be a multiple of the 2 data-parallel processes" in text
    text = told(InputError, 2, lambda rank: train(root, "none", model="llama", sp=2))
    assert text == "sp is 2; it must be 1: LlamaForCausalLM reads whole windows"
    assert_trained(root, "one", 1)

    def stop_last(rank: int) -> None:
        """A scheduler's word reaches one process alone."""

        def report(progress: Any) -> None:
            if progress.step == 3 and rank == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        run = train(root, "stopped", report=report, save_every=0, **SHARDS_AND_SLICES)
        assert run.step == 3

    assert fleet(root, 4, stop_last) == [0] * 4
    assert [path.name for path in checkpoint.checkpoints(root / "stopped" / "checkpoints")] == ["step_00000003"]
    assert_trained(root, "stopped", 2, dp_shard=2, save_every=2)
    assert curve(root / "stopped")[-1]["step"] == 6

    def full_disk(rank: int) -> None:
        write = weights.WeightsToWrite.write

        def fail(self: Any, folder: Path) -> None:
            if rank == 1 and folder.name.startswith("step_00000004"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, folder)

        weights.WeightsToWrite.write = fail
        train(root, "full", dp_shard=2)

    assert "rank 1: cannot write " in (text := told(DiskError, 2, full_disk))
    assert "No space left on device" in text
    assert [path.name for path in (root / "full" / "checkpoints").iterdir()] == ["step_00000002"]
    assert_trained(root, "full", 2, dp_shard=2)
    assert_same(root, "full")

    # A time budget is one clock's.
    timed = {"steps": None, "max_minutes": 1 / 60, "warmup_steps": 5, "eval_every": 0, "save_every": 0}
    assert_trained(root, "timed", 2, dp_shard=2, **timed)

    def one_spoils(rank: int) -> None:
        step = Learner.step

        def spoil(self: Learner, *how: Any) -> Any:
            result = step(self, *how)
            weight = next(self.model.parameters())
            if rank == 1 and self.optimizer_state()["model.embed_tokens.weight.step"] == 4:
                weight.detach().to_local()[7, 7] = float("nan")
            return result

        Learner.step = spoil
        train(root, "spoiled", dp_shard=2, eval_every=0)

    assert "the largest weight is nan at step 4" in told(DivergedError, 2, one_spoils)
    assert [path.name for path in (root / "spoiled" / "checkpoints").iterdir()] == ["step_00000002"]


def die_in(where: str, rank: int, at: int) -> None:
    """Let this process be killed when it comes to that place for the `at`-th time."""
    count = 0

    def counted(operation: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return call

    if where == "step":
        Trainer._train_step = counted(Trainer._train_step)
    elif where == "save":
        saving.Saver.save = counted(saving.Saver.save)
    elif where == "weights":
        weights.WeightsToWrite.write = counted(weights.WeightsToWrite.write)
    elif where == "optimizer":
        torch.distributed.checkpoint.FileSystemWriter.write_data = counted(
            torch.distributed.checkpoint.FileSystemWriter.write_data
        )
    elif where == "sync":
        checkpoint._sync = counted(checkpoint._sync)
    else:
        checkpoint.os.rename = counted(os.rename)


PLACES = {"step": 6, "save": 3, "weights": 3, "optimizer": 3, "sync": 40, "rename": 9}  # and how often they are met


def kills(root: Path, deaths: list[tuple[str, int, int]]) -> None:
    """A process is killed; the others end by themselves; what goes on from there is the same run."""
    assert_trained(root, "one", 1)
    killed = 0
    meshes = [(2, {"dp_shard": 2}), (2, {"sp": 2}), (4, SHARDS_AND_SLICES)]
    for number, (where, rank, at) in enumerate(deaths):
        ranks, mesh = meshes[number % len(meshes)]
        victim = rank % ranks

        def live(rank: int, where: str = where, at: int = at, mesh: dict = mesh, victim: int = victim) -> None:
            if rank == victim:
                die_in(where, rank, at)
            train(root, "killed", **mesh)

        ended = fleet(root, ranks, live)
        assert ended[victim] in (KILLED, 0), (where, ended)  # not every process comes to every place
        assert ended[victim] == 0 or all(end in (0, 1) for end in ended if end != KILLED), (where, ended)
        killed += ended[victim] == KILLED
        for folder in checkpoint.checkpoints(root / "killed" / "checkpoints"):
            assert checkpoint.load_state(folder)["step"] == int(folder.name.removeprefix("step_"))
            load_model(folder)
        again, mesh = meshes[(number + 1) % len(meshes)]
        assert_trained(root, "killed", again, **mesh)
        assert_same(root, "killed")
        shutil.rmtree(root / "killed")
    assert killed >= 0.8 * len(deaths), f"only {killed} of {deaths} died"


def main(name: str, root: Path) -> None:
    torch.set_num_threads(1)
    if name == "kills":
        kills(root, [("step", 1, 4), ("weights", 1, 2), ("optimizer", 3, 2), ("rename", 0, 5), ("sync", 0, 12)])
    elif name == "many_kills":
        draw = random.Random(0)
        kills(
            root,
            [(place, draw.randrange(4), draw.randint(1, PLACES[place])) for place in draw.choices([*PLACES], k=20)],
        )
    else:
        {"same": same, "ends": ends}[name](root)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
