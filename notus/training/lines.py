"""A file of JSON lines, each of a step, that a resumed run goes on with."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from notus.runtime.files import disk_error
from notus.runtime.process import tell


class StepLines:
    """One JSON object per line, each with `step`, in the order of the steps."""

    def __init__(self, path: Path, *, resume_step: int, last_logged: int = 0) -> None:
        """Open `path` for appending; lines after `resume_step` are from steps that will be taken again, and go.

        Warns if the line of the step `last_logged` is not there.

        Raises:
            ValueError: the file holds something else than such lines.
            OSError: the disk refuses; so do `append` and `sync`.
        """
        self._path = path
        kept = _lines_until(path, resume_step) if path.exists() else []
        if last_logged and not (kept and _step_of(kept[-1]) == last_logged):
            tell(f"warning: {path} has lost lines: step {last_logged} was logged, and is not there")
        temporary = path.with_suffix(".partial")
        try:
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise disk_error(path, error) from error

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write one line per record."""
        text = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        try:
            while text:  # a disk that fills up takes a part first, and says why on the next attempt
                text = text[self._file.write(text) :]
        except OSError as error:
            raise disk_error(self._path, error) from error

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self._path, error) from error

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


def _lines_until(path: Path, step: int) -> list[bytes]:
    """Whole lines up to and including `step`; a last line that a crash cut short is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        found = _step_of(line)
        if found is None and number < len(lines):
            raise ValueError(f"{path}, line {number}: not a line of {path.stem}; restore the file, or move it away")
        if found is None or found > step:
            break
        kept.append(line)
    return kept


def _step_of(line: bytes) -> int | None:
    """The step of a line; None for anything else, and for a line without its end."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) and line.endswith(b"\n") else None
    return step if isinstance(step, int) else None
