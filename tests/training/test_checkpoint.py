import os

import pytest
import torch

from lightning_attention.errors import DiskError, InputError
from lightning_attention.training import checkpoint


def fill(folder, content="x"):
    (folder / "a.txt").write_text(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text(content)


def test_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder"
    with checkpoint.atomic_folder(target) as unfinished:
        fill(unfinished)
        assert not target.exists()
    assert (target / "sub" / "b.txt").read_text() == "x"
    assert os.listdir(target.parent) == ["folder"]


def test_nothing_appears_when_the_block_raises(tmp_path):
    def fail():
        with checkpoint.atomic_folder(tmp_path / "folder") as unfinished:
            fill(unfinished)
            raise OSError("disk full")

    with pytest.raises(DiskError, match=rf"cannot write {tmp_path}/folder: disk full \([\d,.]+ MB free there\)"):
        fail()
    assert os.listdir(tmp_path) == []


def test_every_file_is_synced_before_the_name_is_given_and_the_name_after(tmp_path, monkeypatch):
    events = []

    def sync(path):
        events.append(("sync", path.name.removesuffix(checkpoint.UNFINISHED)))

    def rename(old, new):
        events.append(("rename", new.name))
        os.replace(old, new)

    monkeypatch.setattr(checkpoint, "_sync", sync)
    monkeypatch.setattr(checkpoint.os, "rename", rename)
    with checkpoint.atomic_folder(tmp_path / "folder") as unfinished:
        fill(unfinished)
    renamed = events.index(("rename", "folder"))
    assert {name for _, name in events[:renamed]} == {"a.txt", "sub", "b.txt", "files.json", "folder"}
    assert events[renamed + 1 :] == [("sync", tmp_path.name)]


def test_an_existing_folder_is_not_replaced(tmp_path):
    fill(tmp_path)

    def again():
        with checkpoint.atomic_folder(tmp_path):
            pass

    with pytest.raises(FileExistsError, match="exists already"):
        again()
    assert (tmp_path / "a.txt").exists()


def test_only_whole_checkpoints_count_and_the_oldest_go(tmp_path):
    for step in (5, 100, 20):
        with checkpoint.atomic_folder(checkpoint.checkpoint_path(tmp_path, step)) as folder:
            fill(folder)
    (tmp_path / ("step_00000200" + checkpoint.UNFINISHED)).mkdir()
    (tmp_path / ("chapter" + checkpoint.UNFINISHED)).mkdir()
    (tmp_path / "step_7").mkdir()
    (tmp_path / "step_00000300").write_text("a file")
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step_00000005", "step_00000020", "step_00000100"]
    checkpoint.prune(tmp_path, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == names[1:]
    assert [path.name for path in checkpoint.unfinished_checkpoints(tmp_path)] == ["step_00000200.unfinished"]
    assert (tmp_path / "step_7").exists()


def test_a_folder_with_files_of_somebody_else_stays(tmp_path):
    for step in (1, 2, 3):
        with checkpoint.atomic_folder(checkpoint.checkpoint_path(tmp_path, step)) as folder:
            fill(folder)
    notes = checkpoint.checkpoint_path(tmp_path, 1) / "sub" / "notes.txt"
    notes.write_text("years of work")
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]
    with pytest.raises(InputError, match=r"holds files that no run wrote \(sub/notes.txt\); move them elsewhere"):
        checkpoint.remove_folder(checkpoint.checkpoint_path(tmp_path, 1))
    assert notes.read_text() == "years of work"


def whole_state() -> checkpoint.State:
    return {
        "step": 3, "planned_steps": None, "config": {"lr": 1e-3}, "data_fingerprint": "0", "record": {"list": [1, "x"]},
        "learner": {"weights": torch.randn(100)},
    }  # fmt: skip


def test_another_versions_state_is_named(tmp_path):
    state = whole_state()
    del state["record"], state["config"]
    checkpoint.save_state(tmp_path, state)
    with pytest.raises(InputError, match=r"has no config, record: another version of lightning-attention wrote it"):
        checkpoint.load_state(tmp_path)


def test_state_round_trip_and_damage(tmp_path):
    state = whole_state()
    checkpoint.save_state(tmp_path, state)
    loaded = checkpoint.load_state(tmp_path)
    assert torch.equal(loaded["learner"].pop("weights"), state["learner"].pop("weights"))
    assert loaded == state
    file = tmp_path / checkpoint.STATE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"trainer_state.pt is damaged .*; delete "):
        checkpoint.load_state(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="is not a training checkpoint"):
        checkpoint.load_state(tmp_path)


def test_a_state_that_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / checkpoint.STATE_FILE).mkdir()  # for root may read every file
    with pytest.raises(InputError, match=r"cannot read .*trainer_state.pt: Is a directory") as caught:
        checkpoint.load_state(tmp_path)
    assert "delete" not in str(caught.value)


def test_a_folder_that_lies_elsewhere_is_removed_by_its_link(tmp_path):
    with checkpoint.atomic_folder(tmp_path / "large_disk" / "tokens") as folder:
        fill(folder)
    (tmp_path / "tokens").symlink_to(tmp_path / "large_disk" / "tokens")
    checkpoint.remove_folder(tmp_path / "tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["large_disk"]
    assert (tmp_path / "large_disk" / "tokens").is_dir()


def test_find_model(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        folder = checkpoint.checkpoint_path(run / "checkpoints", step)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert checkpoint.find_model(run).name == "step_00000002"
    assert checkpoint.find_model(run / "checkpoints").name == "step_00000002"
    assert checkpoint.find_model(run / "checkpoints" / "step_00000001").name == "step_00000001"
    with pytest.raises(InputError, match="no such folder"):
        checkpoint.find_model(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no model"):
        checkpoint.find_model(tmp_path)
