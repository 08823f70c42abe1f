"""Whether the files that a finished run read are as they were: its model is of those of that time."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from notus.config import Config
from notus.data.sources import data_suffix, parts
from notus.runtime.files import check_regular
from notus.training.run_data import DATA_FILE

FILES = "files"  # the key in `data.json`
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


def check_unchanged(config: Config, folder: Path) -> None:
    """Raise ValueError if a file that the finished run in `folder` read has other contents now.

    A file that is gone says nothing, and neither does an older run, which noted none.
    """
    for key, files in read_stamps(folder).items():
        now = {str(path): path for each, path in _files(config) if each == key}
        for name, before in files.items():
            if name in now and _stamp(now[name], before)["sha256"] != before.get("sha256"):
                raise ValueError(
                    f"{folder} holds a finished run, which read other contents of {key}: {name} has changed since, and "
                    "the model has not learned from it. Set training.resume=never to train anew, choose another "
                    "training.output_dir, or restore the file"
                )


def _files(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield the key and path of each file that the run reads its rows by; of folders those with data."""
    data = config.data
    for key, source in (("data.train", data.train), ("data.eval", data.eval)):
        for part in parts(source) if source else ():
            yield from ((key, path) for path in _data_files(Path(part.path)))
    for key, name in (("data.exclude", data.exclude), ("data.chat_template", data.chat_template)):
        if name is not None and Path(name).is_file():
            yield key, Path(name)


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    found = (each for each in path.rglob("*") if data_suffix(each) or each.suffix == ".arrow")
    return sorted(each for each in found if each.is_file() and not each.name.startswith(("cache-", ".")))


def _stamp(path: Path, known: Mapping[str, Any]) -> Stamp:
    """A file's stamp, without reading it if `known` has its size and times."""
    status = path.stat()
    facts = {"bytes": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns}
    if "sha256" in known and all(known.get(name) == value for name, value in facts.items()):
        return dict(known)
    with path.open("rb") as file:
        return {**facts, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
