"""Result files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def check_output(path: Path, *, not_over: str) -> None:
    """Make the result's parent folder, before the work that fills it.

    Raises ValueError if the result would stand in the place of a folder, or of the input `not_over`; OSError if nothing
    can be written there.
    """
    if path.is_dir():
        raise ValueError(f"{path}: there is a folder of that name; choose another")
    if path.exists() and Path(not_over).exists() and path.samefile(not_over):
        raise ValueError(f"{path}: the result would replace the input; choose another name")
    check_folder(path.parent, remedy="choose another place")


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


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file beside `path` that takes its place at the end, unless an error ends it first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
