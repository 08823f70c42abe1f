"""Moved to `results` and `notus.runtime.files`; removed once all importers are changed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from notus.evaluation.results import check_folder as check_folder
from notus.evaluation.results import check_output as check_output
from notus.evaluation.results import hold_folder as hold_folder
from notus.evaluation.results import parse_files as told
from notus.runtime import files

__all__ = ["check_folder", "check_output", "hold_folder", "replacing", "told"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that replaces `path` at the end."""
    with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file
