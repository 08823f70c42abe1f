"""Whether the files that a finished run read are as they were: its model is of those of that time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from notus.config import Config
from notus.data.sources import file_digest, files_of, parts
from notus.runtime.files import check_regular
from notus.runtime.process import tell
from notus.training.run_data import DATA_FILE

FILES = "files"  # the key in `data.json`
_LARGE = 10**10  # bytes of a file that it takes a while to read
Stamp: TypeAlias = dict[str, Any]  # of a file: bytes, modified, changed, sha256
Stamps: TypeAlias = dict[str, dict[str, Stamp]]  # by config key, then by the file's name


def read_stamps(folder: Path) -> Stamps:
    """What `stamps` returned in the last launch of the run in `folder`; nothing, if it cannot be read."""
    try:
        found = json.loads(check_regular(folder / DATA_FILE).read_text(encoding="utf-8"))[FILES]
        return {str(key): {str(name): dict(stamp) for name, stamp in files.items()} for key, files in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # an older run, or one that has not got so far
        return {}


def stamps(config: Config, before: Stamps) -> Stamps:
    """Size, times and sha256 of each local file that the config's data keys name; ids of the hub have none.

    Args:
        config: the run's.
        before: earlier stamps. A file whose size and times have not changed is not read again.
    """
    found: Stamps = {}
    for key, path in _files(config):
        known = before.get(key, {}).get(str(path), {})
        found.setdefault(key, {})[str(path)] = _stamp(path, known)
    return found


TRAIN_ANEW = "set training.resume=never to train anew, choose another training.output_dir"


def check_unchanged(config: Config, folder: Path, *, remedy: str = TRAIN_ANEW) -> None:
    """Raise ValueError if a file that the finished run in `folder` read has other contents now.

    A file that is gone says nothing, and neither does an older run, which noted none. `remedy` says what to do, beside
    restoring the file.
    """
    noted = read_stamps(folder)
    for key, path in _files(config) if noted else ():
        before = noted.get(key, {}).get(str(path))
        if before is not None and path.stat().st_size >= _LARGE:
            tell(f"comparing {path} ({path.stat().st_size / 1e9:.0f} GB) with what the run read")
        if before is not None and _stamp(path, before)["sha256"] != before.get("sha256"):
            raise ValueError(
                f"{folder} holds a finished run, which read other contents of {key}: {path} has changed since: "
                f"{remedy}, or restore the file"
            )


def _files(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield the key and path of each file that the run reads its rows by."""
    data = config.data
    for key, source in (("data.train", data.train), ("data.eval", data.eval)):
        for part in parts(source) if source else ():
            yield from ((key, path) for path in files_of(Path(part.path), part.split))
    for key, name in (("data.exclude", data.exclude), ("data.chat_template", data.chat_template)):
        if name is not None and Path(name).is_file():
            yield key, Path(name)


def _stamp(path: Path, known: Mapping[str, Any]) -> Stamp:
    """A file's stamp, without reading it if `known` has its size and times."""
    status = path.stat()
    facts = {"bytes": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns}
    if "sha256" in known and all(known.get(name) == value for name, value in facts.items()):
        return dict(known)
    return {**facts, "sha256": file_digest(path)}
