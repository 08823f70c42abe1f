"""Files, saved datasets and hub datasets, opened as rows that say where they stand.

A JSON file is not loaded: it is indexed once, by byte ranges, and its rows are parsed where they are
tokenised, in parallel. All else is memory-mapped Arrow. So a million rows cost little memory in any form;
only the index of a .json array reads its file whole.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets.exceptions import DatasetGenerationError

SUFFIXES = (".jsonl", ".json", ".parquet")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_BOM = b"\xef\xbb\xbf"
_RANGE = np.dtype([("start", np.int64), ("length", np.int64), ("line", np.int64)])
_JSON_SPACE = re.compile(r"[ \t\n\r]*")

Placed = tuple[str, Any]  # where a row stands, for messages, and the row


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture: a path or hub id, its split, and the share of its rows to take (2: twice)."""

    path: str
    split: str = "train"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened source.

    `rows` are its rows, or for JSON their byte ranges (`start`, `length`, `line`) in `json_path`; `digest`
    changes with the content.
    """

    name: str
    digest: str
    rows: datasets.Dataset
    json_path: Path | None = None
    numbered_by_line: bool = False


def parts(source: str | Path | Sequence[Mapping[str, Any]]) -> list[Part]:
    """The parts of a source as configured: a path or hub id, or a list of {path, split, weight}.

    Raises ValueError for an empty list, unknown keys and weights that are not positive numbers.
    """
    if isinstance(source, str | Path):
        return [Part(str(source))]
    if not source:
        raise ValueError("the list of data sources is empty; give at least one {path: ...}")
    return [_part(entry, number) for number, entry in enumerate(source, start=1)]


def _part(entry: Mapping[str, Any], number: int) -> Part:
    known = [field.name for field in dataclasses.fields(Part)]
    if not isinstance(entry, Mapping) or "path" not in entry or not set(entry) <= set(known):
        raise ValueError(f"data source {number} is {entry!r}, but must be {{path, split, weight}}, with at least path")
    given = {key: value for key, value in entry.items() if value is not None}
    part = Part(**{**given, "path": str(entry["path"])})
    weight = part.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"data source {number} ({part.path}): weight is {weight!r}, but must be a number above 0")
    return part


def open_source(name: str, split: str = "train") -> Source:
    """Open a .jsonl, .json or .parquet file, a folder that `datasets` saved or can load, or a hub dataset.

    Raises ValueError, naming the source and the remedy, for what is missing, empty or unreadable, and for a
    split that is not there (a file is the split "train").
    """
    path = Path(name)
    if path.is_file():
        source = _open_file(path, split)
    elif path.is_dir():
        source = _from_arrow(name, _load_folder(path, split))
    elif path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"{name}: there is no such file or folder; check the path")
    else:
        source = _from_arrow(name, _load_hub(name, split))
    if len(source.rows) == 0:
        raise ValueError(f"{name}: holds no rows; give a source with at least one")
    return source


def read_rows(source: Source, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Iterator[Placed]:
    """(place, row) of each row of a batch of `source.rows`; rows and lines count from 1.

    Raises ValueError, naming the file and line, for what is not JSON.
    """
    if source.json_path is None:
        for number, index in enumerate(indices):
            yield f"{source.name}, row {index + 1}", {column: batch[column][number] for column in batch}
        return
    with source.json_path.open("rb") as file:
        for number, index in enumerate(indices):
            line = f"line {batch['line'][number]}"
            place = f"{source.name}, {line}" if source.numbered_by_line else f"{source.name}, row {index + 1} ({line})"
            file.seek(batch["start"][number])
            yield place, _decoded(file.read(batch["length"][number]), place)


def _decoded(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 at byte {error.start} of the row; convert the file") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error}); correct or remove the row") from error


def _open_file(path: Path, split: str) -> Source:
    if split != "train":
        raise ValueError(f"{path}: has no split {split!r}, a file is the split 'train'; leave split out")
    if path.suffix == ".parquet":
        return _from_arrow(str(path), _load_parquet(path), digest=_file_digest(path))
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: files of type {path.suffix or '(none)'} are not read; convert to {', '.join(SUFFIXES)}"
        )
    as_array = path.suffix == ".json" and _first_byte(path) == b"["  # the name is also used for JSON lines
    ranges = np.fromiter(_elements(path) if as_array else _lines(path), dtype=_RANGE)
    rows = datasets.Dataset.from_dict({column: ranges[column] for column in _RANGE.names or ()})
    return Source(str(path), _file_digest(path), rows, path, numbered_by_line=not as_array)


def _from_arrow(name: str, rows: datasets.Dataset, digest: str | None = None) -> Source:
    return Source(name, digest or rows._fingerprint, rows)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip()[:1]


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """The byte range and number of each line that is not blank."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield position, len(line), number
            position += len(line)


def _elements(path: Path) -> Iterator[tuple[int, int, int]]:
    """The byte range and first line of each element of the file's one JSON array."""
    # Latin-1 makes each byte one character and leaves JSON's own characters as they are: positions are bytes.
    text = path.read_bytes().decode("latin-1")
    decoder, start, line, seen = json.JSONDecoder(), text.index("[") + 1, 1, 0
    try:
        while not text.startswith("]", start := _past_space(text, start)):
            _, end = decoder.raw_decode(text, start)
            line, seen = line + text.count("\n", seen, start), start
            yield start, end - start, line
            start = _past_space(text, end)
            if text.startswith(",", start):
                start += 1
            elif not text.startswith("]", start):
                raise json.JSONDecodeError("expected ',' or ']'", text, start)
        if (end := _past_space(text, start + 1)) != len(text):
            raise json.JSONDecodeError("expected the end of the file", text, end)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); correct the file") from error
    except RecursionError as error:
        raise ValueError(f"{path}, line {line}: not JSON (it nests too deeply); correct the file") from error


def _past_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    assert match is not None
    return match.end()


def _load_parquet(path: Path) -> datasets.Dataset:
    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except (DatasetGenerationError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error.__cause__ or error})") from error


def _load_folder(path: Path, split: str) -> datasets.Dataset:
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = _choose_split(datasets.load_from_disk(str(path)), path, split)
            _check_inside([file["filename"] for file in rows.cache_files], path)
            return rows
        return load_described(str(path), split)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{path}: cannot be read as a dataset, split {split!r} ({error})") from error


def load_described(name: str, split: str) -> datasets.Dataset:
    """The split of a folder or hub dataset, of the files that its card names, or else of all its data files.

    Raises ValueError, before any of them is read, for files outside of it, and for archives; and what
    `datasets.load_dataset` does.
    """
    files = [file for found in (datasets.load_dataset_builder(name).config.data_files or {}).values() for file in found]
    archives = [file for file in files if "::" in file or file.endswith(_ARCHIVES)]
    if archives:
        raise ValueError(f"{archives[0]} is an archive; unpack it, and give the files")
    _check_inside([file for file in files if not file.startswith("hf://")], Path(name))
    return datasets.load_dataset(name, split=split)


def _check_inside(files: Sequence[str], folder: Path) -> None:
    """Refuse what a dataset says of itself where it leads out of it; a link that its owner made is no such word."""
    names = (os.path.abspath(folder), folder.resolve())  # `datasets` resolves links to the folder, but none in it
    for file in files:
        if "://" in file or not any(Path(os.path.abspath(file)).is_relative_to(name) for name in names):
            raise ValueError(
                f"the dataset names {file}, which lies outside of it; name that file itself if you trust it"
            )


def _choose_split(loaded: datasets.Dataset | datasets.DatasetDict, path: Path, split: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    if split not in loaded:
        raise ValueError(f"it holds {', '.join(loaded)}; choose one with split")
    return loaded[split]


def _load_hub(name: str, split: str) -> datasets.Dataset:
    try:
        return load_described(name, split)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"{name}: is no file or folder here, and cannot be loaded from the hub, split {split!r} "
            f"({error}); check the name, the split and the connection"
        ) from error
