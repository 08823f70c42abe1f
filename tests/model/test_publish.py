import errno
from pathlib import Path

import pytest
import torch
from disks import largest_file, on_small_disk

from notus.model.publish import NewFolder, write_tensors
from notus.runtime.files import disk_error

WRITE = """
import sys
from pathlib import Path
import torch
from notus.model.publish import NewFolder, write_tensors
folder = Path(sys.argv[1]) / "out"
new = NewFolder(folder, markers=set())
new.write(lambda partial: write_tensors(partial / "large.safetensors", {"x": torch.zeros(10**6)}))
try:
    new.publish()
except OSError as error:
    print(error, list(folder.parent.iterdir()))
"""


def test_disk_error_names_path_reason_and_free_space(tmp_path: Path) -> None:
    error = disk_error(tmp_path / "absent" / "file", OSError(errno.ENOSPC, "No space left on device", "elsewhere"))
    assert isinstance(error, OSError)
    assert str(error).startswith(f"{tmp_path}/absent/file: cannot be written (No space left on device); ")
    assert str(error).endswith(f" GB free in {tmp_path}")


def test_a_folder_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for size in (10, 10**5):
        new = NewFolder(folder, markers={"x.safetensors"})
        with largest_file(10**4):
            new.write(lambda partial, size=size: write_tensors(partial / "x.safetensors", {"x": torch.zeros(size)}))
            new.write(lambda partial: (partial / "more").touch())
        if size == 10:
            new.publish()
    with pytest.raises(OSError, match=rf"{folder}: cannot be written \(x.safetensors: .*\); [\d.]+ GB free in "):
        new.publish()
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "x.safetensors").stat().st_size < 10**4


def test_a_full_disk_is_told_with_its_free_space(tmp_path: Path) -> None:
    ended = on_small_disk(tmp_path, 2 * 10**6, WRITE, tmp_path)
    if ended is None:
        pytest.skip("no file system may be mounted here")
    assert ended.returncode == 0, ended.stderr
    assert "No space left" in ended.stdout
    assert f"; 0.0 GB free in {tmp_path} []" in ended.stdout
