"""What every writer of files needs: to know that they are on disk, and to say why they are not."""

import os
import shutil
from pathlib import Path


def disk_error(path: Path, error: OSError | str) -> OSError:
    """What to raise where writing `path` failed: it names the path, the reason and the free space there."""
    reason = error if isinstance(error, str) else error.strerror or str(error)
    place = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free / 1e9
    return OSError(f"{path}: cannot be written ({reason}); {free:.1f} GB free in {place}")


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Make `text` the content of `path`, whole at any time. Raises OSError, see `disk_error`."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
