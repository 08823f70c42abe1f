"""Disks that fill up, really: by a limit on the size of files, or by a small file system of its own."""

import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes; writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def on_small_disk(folder: Path, size: int, code: str, *arguments: object) -> subprocess.CompletedProcess[str] | None:
    """Run Python `code` with a file system of `size` bytes mounted on `folder`; None where that is not allowed."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} none {folder}"
    try:
        if subprocess.run([*unshare, mount], capture_output=True).returncode != 0:
            return None
    except FileNotFoundError:
        return None
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run([*unshare, f'{mount} && exec "$@"', "sh", *words], capture_output=True, text=True)
