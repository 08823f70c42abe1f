"""Files that are replaced whole or not at all, and their lock."""

import errno
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from disks import largest_file

from notus.runtime.files import disk_error, free_space, is_locked, lock, replacing, write_text


@pytest.mark.parametrize("locked", [False, True])
def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path: Path, locked: bool) -> None:
    path = tmp_path / "found.json"
    write_text(path, "before")

    def fail() -> None:
        with replacing(path, locked=locked) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1"
    code = (
        "import os, sys, pathlib\nfrom notus.runtime.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1]), locked=True) as temporary:\n"
        "    temporary.write_text('half')\n    os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert "tfevents" not in left.name  # TensorBoard would read it
    write_text(path, "whole", locked=True)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_writers_without_a_lock_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    with replacing(path) as first, replacing(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"  # the one that ended last


def test_a_lock_keeps_other_processes_away_until_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = (
        "import pathlib, sys\nfrom notus.runtime.files import is_locked, lock\npath = pathlib.Path(sys.argv[1])\n"
        "print(is_locked(path))\ntry:\n    lock(path.open('a'))\nexcept BlockingIOError:\n    print('held')"
    )

    def elsewhere() -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
        ).stdout.split()

    assert not is_locked(path)
    with path.open("a") as file:
        lock(file)
        assert elsewhere() == ["True", "held"]
    assert elsewhere() == ["False"]


def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_text(path, "before")
    with largest_file(3), pytest.raises(OSError, match=r"file\.json: cannot be written \(File too large\)"):
        write_text(path, "after this")
    assert path.read_text() == "before"


def test_disk_error_names_path_reason_and_free_space(tmp_path: Path) -> None:
    error = disk_error(tmp_path / "absent" / "file", OSError(errno.ENOSPC, "No space left on device", "elsewhere"))
    assert str(error).startswith(f"{tmp_path}/absent/file: cannot be written (No space left on device); ")
    assert str(error).endswith(f" GB free in {tmp_path}")
    copied = pickle.loads(pickle.dumps(error))  # as it goes from one rank to another
    assert (str(copied), copied.reason) == (str(error), "No space left on device")


@pytest.mark.parametrize(
    ("free", "shown"), [(0, "0.00 MB"), (880_000, "0.88 MB"), (51_234_567, "51.23 MB"), (2_000_000_000, "2.0 GB")]
)
def test_free_space_is_shown_in_a_unit_that_fits(
    free: int, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    assert free_space(tmp_path / "absent" / "file") == f"{shown} free in {tmp_path}"
