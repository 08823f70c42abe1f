"""Result files that appear whole or not at all, in folders that one evaluation at a time writes."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from notus.runtime.files import disk_error

T = TypeVar("T")

LOCK = ".lock"

_held: dict[Path, IO[str]] = {}  # the locks of this process, until it ends


def check_output(path: Path, *, not_over: str, remedy: str = "choose another place") -> None:
    """Make the result's parent folder, before the work that fills it.

    Raises ValueError if the result would stand in the place of a folder, of a device (for root, /dev/null itself would
    become a file), or of the input `not_over`; OSError if nothing can be written there.
    """
    if path.is_dir():
        raise ValueError(f"{path}: there is a folder of that name; choose another")
    device = path.absolute().parent == Path("/dev")  # which has links to files, too
    if device or (path.exists() and not path.is_file()):
        raise ValueError(f"{path}: no ordinary file, which a result could replace; choose another name")
    if path.exists() and Path(not_over).exists() and path.samefile(not_over):
        raise ValueError(f"{path}: the result would replace the input; choose another name")
    check_folder(path.parent, remedy=remedy)


def check_folder(folder: Path, *, remedy: str = "name another with --output") -> None:
    """Make a folder for results, before the work that fills it.

    Raises OSError, with what to do, if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: no results can be written there ({error.strerror}); {remedy}") from error


def hold_folder(folder: Path) -> None:
    """`check_folder`, and lock it against a second evaluation, which would ask and pay for the same once more.

    The lock goes with the process. A file system without locks is used without one.

    Raises:
        ValueError: another process holds it.
        OSError: as `check_folder`.
    """
    check_folder(folder)
    place = folder.resolve()
    if place in _held:  # to open and close the file again would let the lock go
        return
    file = (folder / LOCK).open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise ValueError(
            f"{folder}: another evaluation is writing there; wait for its end, or name another with --output"
        ) from error
    except OSError:
        pass
    _held[place] = file


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file beside `path` that takes its place at the end, unless an error ends it first.

    Raises OSError, see `disk_error`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def told(files: str, folders: Sequence[Path], make: Callable[[], T]) -> T:
    """What `make` makes of `files`, which lie in each of `folders`.

    Raises:
        ValueError: naming them, if what they hold is not as this version writes it: damaged, or of another version.
    """
    try:
        return make()
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        where = ", ".join(str(folder / files) for folder in folders)
        raise ValueError(
            f"{where}: not as this version writes it ({type(error).__name__}: {error}); restore it, or move it away"
        ) from error
