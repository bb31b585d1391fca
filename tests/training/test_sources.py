import errno
import os
from pathlib import Path

import pytest

from lightning_attention.errors import InputError
from lightning_attention.training.run_folder import MARKER
from lightning_attention.training.sources import Finder, Tally
from tests.training.test_corpus import left_out, read
from tests.training.tiny import tiny_settings, train


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_links_count_once(tmp_path):
    file = write(tmp_path / "real" / "a.txt", "a")
    (tmp_path / "real" / "b.txt").symlink_to(file)
    (tmp_path / "real" / "c.txt").hardlink_to(file)
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "nowhere.txt").symlink_to(tmp_path / "gone.txt")
    assert read(tmp_path) == "a|"
    reasons = left_out(tmp_path)
    assert len(reasons["the same file or folder by another name"]) == 3
    assert reasons["cannot be read (No such file or directory)"] == ["nowhere.txt"]
    assert read(tmp_path / "linked", tmp_path / "real" / "a.txt") == "a|"


def test_a_linked_folder_is_read(tmp_path):
    write(tmp_path / "elsewhere" / "a.txt", "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert read(tmp_path / "data") == "a|"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    write(tmp_path / "a.txt", "a")
    os.mkfifo(tmp_path / "pipe")
    assert left_out(tmp_path) == {"neither a file nor a folder": ["pipe"]}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "closed" / "b.txt", "b")
    scandir = os.scandir  # the tests may run as root, who may read everything

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert read(tmp_path) == "a|"
    assert left_out(tmp_path) == {"cannot be read (Permission denied)": ["closed"]}
    with pytest.raises(InputError, match=r"cannot read .*closed: Permission denied"):
        read(tmp_path / "closed")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_user_who_may_not_search_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "closed" / "b.txt", "b")
    (tmp_path / "closed").chmod(0)
    monkeypatch.chdir(tmp_path)  # nobody may not search the folders above it
    tmp_path.chmod(0o755)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        assert read(".") == "a|"
        assert left_out(".") == {"cannot be read (Permission denied)": ["closed"]}
    finally:
        if is_root:
            os.seteuid(0)
        (tmp_path / "closed").chmod(0o700)


def test_earlier_runs_are_left_out(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path, steps=1)
    train(settings)
    text = (tmp_path / "text.txt").read_text()
    monkeypatch.chdir(tmp_path)
    assert read(".") == text + "|"
    assert left_out(".") == {"a folder of an earlier run": ["run"]}
    assert read("**/*") == text + "|"
    assert "run/config.toml" in Path("run/config.toml").as_posix()
    assert read("run/config.toml").startswith("inputs = ")  # what is named is meant
    with pytest.raises(InputError, match="there is no text in run; left out 1, a folder of an earlier run: run"):
        read("run")


def test_names_that_are_not_unicode_can_be_said(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.bin"
    try:
        Path(os.fsdecode(name)).write_bytes(b"\0")
    except OSError:
        pytest.skip("this file system takes no such names")
    write(tmp_path / "a.txt", "a")
    tally = Tally()
    assert len(list(Finder(tally).find(str(tmp_path)))) == 2
    ((reason, names),) = ((r, n) for r, n in left_out(tmp_path).items())
    assert (reason, names) == ("no text: zero bytes", ["\\udcff.bin"])


def test_the_marker_is_what_makes_a_run(tmp_path):
    write(tmp_path / "run" / "checkpoints" / "notes.txt", "mine")
    write(tmp_path / "b.txt", "b")
    assert read(tmp_path) == "b|mine|"
    write(tmp_path / "run" / MARKER, "{}")
    assert read(tmp_path) == "b|"
