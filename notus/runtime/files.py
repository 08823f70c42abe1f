"""Files and folders that appear whole or not at all, the lock of a folder, and errors that say why a disk failed."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class DiskError(OSError):
    """A file cannot be written.

    Attributes:
        reason: why, without the path and the free space, which the message has too.
    """

    reason = ""


def disk_error(path: Path, error: OSError | str) -> DiskError:
    """Return what to raise where writing `path` failed: it names the path, the reason and the free space there."""
    reason = error if isinstance(error, str) else error.strerror or str(error)
    raised = DiskError(f"{path}: cannot be written ({reason}); {free_space(path)}")
    raised.reason = reason
    return raised


def free_space(path: Path) -> str:
    """Return how much room there is where `path` is, or would be: "0.88 MB free in FOLDER"."""
    place = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    shown = f"{free / 1e9:.1f} GB" if free >= 1e9 else f"{free / 1e6:.2f} MB"
    return f"{shown} free in {place}"


_STREAMS = ("/dev/", "/proc/")  # a shell's <(command), whose writer is there


def check_regular(path: Path) -> Path:
    """Return `path`, which is to be opened; a FIFO without a writer, say, would keep the process waiting for ever.

    Raises:
        OSError: it is a FIFO, a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # whoever opens it says more
        return path
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    kind = kinds.get(stat.S_IFMT(mode))
    if kind and not str(path.absolute()).startswith(_STREAMS):
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    return path


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, *, locked: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file; at the end of the block, sync it and rename it to `path`.

    If the block or the disk fails, `path` is as it was and the temporary file is gone.

    Args:
        path: the file to replace, or to make.
        locked: a lock keeps other writers of `path` away. The temporary file then has a fixed name, so that what a
            killed process left is overwritten. Else each writer has one of its own, and the last to end wins.

    Raises:
        OSError: the disk fails; see `disk_error`.
    """
    # The name does not hold that of `path`: TensorBoard reads every file with "tfevents" in its name.
    name = f"{zlib.crc32(path.name.encode()):08x}" if locked else uuid.uuid4().hex
    temporary = path.with_name(f".{name}.partial")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, locked: bool = False) -> None:
    """Replace the content of `path` with `text`; see `replacing`."""
    with replacing(path, locked=locked) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock(file: IO[Any], *, wait: bool = False) -> None:
    """Lock an open, writable file until it is closed.

    The lock is POSIX's (`lockf`), not `filelock`'s `flock`: a forked worker that outlives a killed process does not
    keep it, and NFS has it. It belongs to the process: it does not exclude other threads, and closing the same file a
    second time releases it.

    Args:
        file: open for writing.
        wait: wait until another process releases the lock, instead of raising an error.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except PermissionError as error:  # what some systems raise for a lock that is held
        raise BlockingIOError(*error.args) from error


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of `lock`; False if there is no such file, or no locks."""
    try:
        with path.open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    return False
