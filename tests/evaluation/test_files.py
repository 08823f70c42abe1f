"""Result files: whole or not at all, one evaluation at a time in a folder, and what is told where a disk refuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from disks import largest_file

from notus.evaluation import files
from notus.evaluation.files import check_output, hold_folder, replacing

ROOT = Path(__file__).parents[2]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    (tmp_path / "result.json").write_text("before")
    told = pytest.raises(OSError, match=r"result.json: cannot be written \(.*GB free")
    with largest_file(100), told, replacing(tmp_path / "result.json") as file:
        file.write("x" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "before"


def test_a_folder_is_one_evaluations_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_held", {})
    code = f"from pathlib import Path; from notus.evaluation import files; files.hold_folder(Path({str(tmp_path)!r}))"
    hold = [sys.executable, "-c", f"{code}; print('held', flush=True); input()"]
    with subprocess.Popen(hold, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another evaluation is writing there; wait for its end, or name another"):
            hold_folder(tmp_path)
        other.kill()
    hold_folder(tmp_path)
    hold_folder(tmp_path)  # the same process goes on, say with another suite
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "another evaluation is writing there" in again.stderr


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "_held", {})
    monkeypatch.setattr(files.fcntl, "lockf", refused)
    hold_folder(tmp_path)
    assert files._held.keys() == {tmp_path.resolve()}


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "fifo"])
def test_devices_are_not_replaced(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with pytest.raises(ValueError, match=f"{path}: no ordinary file"):
        check_output(Path(path), not_over="input")
