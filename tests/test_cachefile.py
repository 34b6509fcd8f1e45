"""The private folder that decisions are remembered in: links, owners, rights, and writers at the same time."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from xform.cachefile import MAX_BYTES, CacheFolder
from xform.errors import XformWarning

NAME = "entry.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CacheFolder:
    monkeypatch.setenv("XFORM_CACHE", str(tmp_path / "cache"))
    return CacheFolder("things", "findings")


def anything(_: Any) -> None:
    return None


def write(folder: CacheFolder, entry: Any) -> None:
    folder.write(NAME, lambda _: entry, anything)


def silently(action: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action()


def test_what_was_written_is_read(folder):
    assert silently(lambda: folder.read(NAME, anything)) is None
    silently(lambda: write(folder, {"a": 1}))
    assert silently(lambda: folder.read(NAME, anything)) == {"a": 1}


def test_folders_and_files_are_private(folder):
    before = os.umask(0)
    try:
        write(folder, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder.path / NAME).stat().st_mode) == 0o600
    folder.path.chmod(0o777)
    assert folder.read(NAME, anything) == 1
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_an_entry_that_is_a_link_is_neither_read_nor_followed(folder, tmp_path):
    write(folder, 1)
    victim = tmp_path / "victim"
    victim.write_text('"precious"')
    (folder.path / NAME).unlink()
    (folder.path / NAME).symlink_to(victim)
    with pytest.warns(XformWarning, match="it is a link"):
        assert folder.read(NAME, anything) is None
    write(folder, 2)
    assert victim.read_text() == '"precious"'
    assert not (folder.path / NAME).is_symlink() and folder.read(NAME, anything) == 2


@pytest.mark.parametrize("level", ["things", "cache"])
def test_a_folder_that_is_a_link_is_refused(folder, tmp_path, level):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "things").mkdir(parents=True)
    if level == "cache":
        (tmp_path / "cache").symlink_to(elsewhere)
    else:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "things").symlink_to(elsewhere)
    for action in (lambda: write(folder, 1), lambda: folder.read(NAME, anything)):
        with pytest.warns(XformWarning, match="findings are not remembered.*set XFORM_CACHE"):
            assert action() is None
    assert sorted(path.name for path in elsewhere.rglob("*")) == ["things"]


def test_what_belongs_to_another_user_is_refused(folder, monkeypatch):
    write(folder, 1)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(XformWarning, match="belongs to another user"):
        assert folder.read(NAME, anything) is None


@pytest.mark.parametrize("place", ["/proc/nothing/here", "/dev/null", "/dev/null/cache", "a\0b"])
def test_a_folder_that_cannot_be_is_told(place, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "XFORM_CACHE": place})
    folder = CacheFolder("things", "findings")
    with pytest.warns(XformWarning, match="findings are not remembered"):
        write(folder, 1)


def test_a_user_without_a_home_is_told(monkeypatch):
    monkeypatch.delenv("XFORM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.warns(XformWarning, match="Could not determine home"):
        write(CacheFolder("things", "findings"), 1)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)


@pytest.mark.parametrize("make", [make_folder, make_pipe, make_huge])
def test_what_is_no_entry_is_told_and_replaced(folder, make):
    folder.path.mkdir(parents=True)
    make(folder.path / NAME)
    with pytest.warns(XformWarning, match="ignored, and found again"):
        assert folder.read(NAME, anything) is None
    silently(lambda: write(folder, 3))
    assert silently(lambda: folder.read(NAME, anything)) == 3


def test_a_disk_that_is_full_leaves_the_entry_that_was_there(folder, monkeypatch):
    write(folder, 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(XformWarning, match="No space left"):
        write(folder, 2)
    assert [path.name for path in folder.path.iterdir()] == [NAME]


def test_leftovers_of_killed_runs_go_in_time(folder):
    write(folder, 1)
    old, new = (folder.path / f".{NAME}.{digit * 16}" for digit in "ab")
    old.write_text("half")
    new.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    write(folder, 2)
    assert not old.exists() and new.exists()


def test_processes_that_write_at_the_same_time_lose_nothing(folder):
    code = """
import sys
from xform.cachefile import CacheFolder
folder = CacheFolder("things", "findings")
for index in range(20):
    folder.write("entry.json", lambda before: {**(before or {}), f"{sys.argv[1]}{index}": index}, lambda _: None)
"""
    runs = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    assert len(json.loads((folder.path / NAME).read_text())) == 40
