"""A cache of Arrow datasets, each a folder that is there whole or not at all, and verified before it is used.

FOLDER/NAME/ holds the Arrow files that `datasets` wrote and `digests.json`, their sha256 by file name. Reading checks
them: Arrow itself notices a short file at best, and no altered token.
"""

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets

from notus.runtime.files import disk_error, sync

_DIGESTS = "digests.json"


def cached(folder: Path, name: str, make: Callable[[str], object]) -> datasets.Dataset:
    """The dataset `name` from the cache; else made, by as many processes at a time as like.

    Args:
        folder: where datasets are cached.
        name: stands for the content.
        make: writes the dataset to the Arrow file of this name, or to numbered files beside it.

    Raises:
        OSError: the disk refuses; see `disk_error`. An earlier state is untouched.
    """
    final = folder / name
    if final.is_dir() and not _is_whole(final):
        print(f"warning: the tokenised dataset {final} is damaged: it is made again", flush=True)
        shutil.rmtree(final)
    if not final.is_dir():
        try:
            _publish(final, make)
        except OSError as error:
            raise disk_error(final, error) from error
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in _files(final)])


def _publish(final: Path, make: Callable[[str], object]) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(final)
    owner = f".{final.name}.{socket.gethostname()}.{os.getpid()}."
    with tempfile.TemporaryDirectory(prefix=owner, dir=final.parent) as beside:
        partial = Path(beside) / "whole"
        partial.mkdir()  # unlike the temporary folder, open to whom the user's other folders are
        make(str(partial / "rows.arrow"))
        (partial / _DIGESTS).write_text(json.dumps(_digests(partial)), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            sync(path)
        try:
            os.rename(partial, final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same rows
                raise


def _clear_leftovers(final: Path) -> None:
    """Remove what processes of this machine that are gone have left of the same dataset."""
    for path in final.parent.glob(f".{final.name}.{socket.gethostname()}.*"):
        owner = path.name.split(".")[-2]
        if not Path("/proc/self").exists() or Path(f"/proc/{owner}").exists():
            continue
        shutil.rmtree(path, ignore_errors=True)  # another process may clear it, too


def _is_whole(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _DIGESTS).read_text(encoding="utf-8")) == _digests(folder))
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in _files(folder):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))
