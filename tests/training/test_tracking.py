import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lightning_attention.errors import DiskError, InputError
from lightning_attention.training.config import make_config
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.tracking import Wandb
from lightning_attention.training.trainer import Trainer
from tests.training.tiny import tiny_settings, train

Points = list[tuple[int, str, float]]


def recorded(run: Path) -> Points:
    """What metrics.jsonl has, by step and name."""
    lines = read_metrics(run / "metrics.jsonl")
    return sorted((line["step"], name, value) for line in lines for name, value in line.items() if name != "step")


def shown_by_tensorboard(run: Path) -> Points:
    events = [event for file in (run / "tensorboard").iterdir() for event in EventFileLoader(str(file)).Load()]
    return sorted((e.step, v.tag, v.tensor.float_val[0]) for e in events for v in e.summary.value)


def stop_at(step: int):
    return lambda progress: progress.step == step and os.kill(os.getpid(), signal.SIGTERM)


def same(found: Points, wanted: Points) -> bool:
    """To float32, which is what event files hold."""
    named = [point[:2] for point in found] == [point[:2] for point in wanted]
    return named and [p[2] for p in found] == pytest.approx([p[2] for p in wanted], rel=1e-6)


def test_tensorboard_shows_the_record_once_also_after_a_resume(tmp_path):
    settings = tiny_settings(tmp_path, tracker="tensorboard", save_every=2)
    run = tmp_path / "run"
    trainer = Trainer(make_config(settings))
    with pytest.raises(RuntimeError, match="killed"):  # after step 3, of which no checkpoint has been written
        trainer.fit(lambda progress: exec("raise RuntimeError('killed')") if progress.step == 3 else None)
    assert same(shown_by_tensorboard(run), recorded(run))
    assert shown_by_tensorboard(run)[-1][0] == 3
    train(settings, resume=True)
    points = shown_by_tensorboard(run)
    assert {step for step, _, _ in points} == set(range(7))
    assert same(points, recorded(run))
    assert not same([(step, name, 2 * value) for step, name, value in points], recorded(run))
    # The next run has nothing of this one, and touches nothing of somebody else.
    (run / "tensorboard" / "notes").write_text("mine")
    train({**settings, "steps": 1, "tracker": "none"}, overwrite=True)
    assert [path.name for path in (run / "tensorboard").iterdir()] == ["notes"]


def test_a_tracker_may_come_when_a_run_goes_on(tmp_path):
    settings = tiny_settings(tmp_path)
    Trainer(make_config(settings)).fit(stop_at(3))
    assert not (tmp_path / "run" / "tensorboard").exists()
    train({**settings, "tracker": "tensorboard"}, resume=True)
    assert same(shown_by_tensorboard(tmp_path / "run"), recorded(tmp_path / "run"))


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    with pytest.raises(DiskError, match=r"cannot write .*tensorboard: No space left on device"):
        train(tiny_settings(tmp_path, tracker="tensorboard"))


class Library(ModuleType):
    """What wandb and trackio have alike: runs, each with a name and what was logged in it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="here")
        self.runs: list[dict[str, Any]] = []

    def init(self, *, project: str, group: str, name: str, config: dict[str, Any]) -> Any:
        print("a greeting")
        self.runs.append({"project": project, "group": group, "name": name, "config": config, "logged": []})
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        logged = self.runs[-1]["logged"]
        assert not logged or step >= logged[-1][0]  # wandb drops what goes back
        logged.extend((step, name, value) for name, value in values.items())

    def finish(self) -> None:
        self.runs[-1]["finished"] = True


@pytest.fixture(params=["trackio", "wandb"])
def library(request, monkeypatch) -> Library:
    library = Library(request.param)
    monkeypatch.setitem(sys.modules, request.param, library)
    return library


def test_loggers_get_the_record_in_a_run_for_each_process(tmp_path, library, capsys):
    settings = tiny_settings(tmp_path, tracker=library.__name__)
    Trainer(make_config(settings)).fit(stop_at(4))
    train(settings, resume=True)
    first, second = library.runs
    assert (first["project"], first["group"], first["name"]) == ("lightning-attention", "run", "run")
    assert (second["group"], second["name"]) == ("run", "run from step 4")
    assert first["finished"]
    assert second["finished"]
    assert first["config"]["width"] == 32
    assert sorted(second["logged"]) == recorded(tmp_path / "run")
    assert sorted(first["logged"]) == [point for point in sorted(second["logged"]) if point[0] <= 4]
    assert capsys.readouterr().out == ""  # which is the command's


def test_a_logger_that_does_not_start_is_an_input_error(tmp_path, library, monkeypatch):
    def refuse(**_: Any) -> None:
        raise RuntimeError("no key is known\nlog in first")

    monkeypatch.setattr(library, "init", refuse, raising=False)
    with pytest.raises(InputError, match=rf"^tracker is {library.__name__}, which could not start: no key is known$"):
        train(tiny_settings(tmp_path, tracker=library.__name__))


def test_a_missing_package_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = tiny_settings(tmp_path, tracker=Wandb.package)
    for folder in ("", "wandb"):  # as wandb leaves one where it is called
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(InputError, match="tracker is wandb, whose package is not installed: pip install wandb"):
            Trainer(make_config(settings))
    assert not (tmp_path / "run").exists()
