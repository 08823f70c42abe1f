import errno
from pathlib import Path

import pytest
from disks import largest_file

from notus.runtime.files import disk_error, write_text


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
