"""Files, saved datasets and hub datasets -> rows, each with its place for error messages.

There are two ways to read. `open_source` and `read_rows` are for training data: random access, in parallel, with
little memory for a million rows. A JSON file is indexed once by byte ranges, and its rows are parsed where they are
tokenised; all else is memory-mapped Arrow. `read_file` and `read_hub` are for everything else, and yield one row after
the other. Only the index of a .json array reads its file whole.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet

if TYPE_CHECKING:  # imported where it is used: curation and judges start without it
    import datasets

SUFFIXES = (".jsonl", ".json", ".parquet")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_BOM = b"\xef\xbb\xbf"
_RANGE = np.dtype([("start", np.int64), ("length", np.int64), ("line", np.int64)])
_BATCH_ROWS = 256
_JSON_SPACE = re.compile(r"[ \t\n\r]*")

Placed = tuple[str, Any]  # where a row stands, for error messages, and the row
Range = tuple[int, int, int]  # where a row's bytes start in a JSON file, how many they are, and on which line


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
    rows: "datasets.Dataset"
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
        rows = _load_folder(path, split)
        source = Source(name, rows._fingerprint, rows)
    elif is_hub_id(name):
        rows = _load_hub(name, split)
        source = Source(name, rows._fingerprint, rows)
    else:
        raise ValueError(f"{name}: there is no such file or folder; check the path")
    if len(source.rows) == 0:
        raise ValueError(f"{name}: holds no rows; give a source with at least one")
    return source


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be a dataset's on the hub."""
    return Path(name).suffix not in SUFFIXES and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name))


def read_rows(source: Source, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Iterator[Placed]:
    """Yield (place, row) for each row of a batch of `source.rows`; rows and lines count from 1.

    Raises ValueError, naming the file and line, for what is not JSON.
    """
    numbers = [index + 1 for index in indices]
    if source.json_path is not None:
        ranges = zip(batch["start"], batch["length"], batch["line"], strict=True)
        yield from _parse(source.json_path, zip(numbers, ranges, strict=True), source.numbered_by_line)
        return
    for at, number in enumerate(numbers):
        yield f"{source.name}, row {number}", {column: batch[column][at] for column in batch}


def read_file(path: Path, columns: Sequence[str] = ()) -> Iterator[Placed]:
    """Return an iterator of (place, row) over a .jsonl, .json or .parquet file.

    Args:
        path: the file.
        columns: the only ones to read of a Parquet file, if it has them all.

    Raises:
        ValueError: naming the file and line, if it cannot be read.
    """
    _check_suffix(path)
    if path.suffix == ".parquet":
        return _stream_parquet(path, columns)
    by_line, ranges = _index(path)
    return _parse(path, enumerate(ranges, start=1), by_line)


def read_hub(name: str, split: str, columns: Sequence[str] = ()) -> Iterator[Placed]:
    """Yield (place, row) over a hub dataset's split; arguments and errors as in `read_file`."""
    rows = _load_hub(name, split)
    tables = rows.select_columns(_wanted(columns, rows.column_names)).with_format("arrow").iter(_BATCH_ROWS)
    yield from _arrow_rows(f"{name}, split {split}", tables)


def _stream_parquet(path: Path, columns: Sequence[str]) -> Iterator[Placed]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = _wanted(columns, file.schema_arrow.names)
            yield from _arrow_rows(str(path), file.iter_batches(_BATCH_ROWS, columns=wanted))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _wanted(columns: Sequence[str], found: list[str]) -> list[str]:
    return list(columns) if columns and set(columns) <= set(found) else found


def _arrow_rows(place: str, tables: Iterable[pyarrow.Table | pyarrow.RecordBatch]) -> Iterator[Placed]:
    rows = (row for table in tables for row in table.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield f"{place}, row {number}", row


def _parse(path: Path, numbered: Iterable[tuple[int, Range]], by_line: bool) -> Iterator[Placed]:
    """Parse the rows of a JSON file at these byte ranges, each with its number from 1."""
    with path.open("rb") as file:
        for number, (start, length, line) in numbered:
            place = f"{path}, line {line}" if by_line else f"{path}, row {number} (line {line})"
            file.seek(start)
            yield place, _decoded(file.read(length), place)


def _decoded(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 at byte {error.start} of the row; convert the file") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a plain ValueError
        raise ValueError(f"{place}: not valid JSON ({error}); correct or remove the row") from error


def _open_file(path: Path, split: str) -> Source:
    import datasets

    if split != "train":
        raise ValueError(f"{path}: has no split {split!r}, a file is the split 'train'; leave split out")
    _check_suffix(path)
    if path.suffix == ".parquet":
        return Source(str(path), _file_digest(path), _load_parquet(path))
    by_line, found = _index(path)
    ranges = np.fromiter(found, dtype=_RANGE)
    rows = datasets.Dataset.from_dict({column: ranges[column] for column in _RANGE.names or ()})
    return Source(str(path), _file_digest(path), rows, path, by_line)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        found = path.suffix or "(none)"
        raise ValueError(f"{path}: files of type {found} are not read; convert to {', '.join(SUFFIXES)}")


def _index(path: Path) -> tuple[bool, Iterator[Range]]:
    """Whether a JSON file holds one row per line, instead of one array of rows; and the rows' byte ranges."""
    if path.suffix == ".json":  # the name is also used for JSON lines
        with path.open("rb") as file:
            if file.read(4096).removeprefix(_BOM).lstrip().startswith(b"["):
                return False, _elements(path)
    return True, _lines(path)


def _lines(path: Path) -> Iterator[Range]:
    """Yield each line that is not blank."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield position, len(line), number
            position += len(line)


def _elements(path: Path) -> Iterator[Range]:
    """Yield each element of the file's one JSON array, with its first line."""
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
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else line
        raise ValueError(f"{path}, line {line}: not JSON ({error}); correct the file") from error


def _past_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    assert match is not None
    return match.end()


def _load_parquet(path: Path) -> "datasets.Dataset":
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except (DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error.__cause__ or error})") from error


def _load_folder(path: Path, split: str) -> "datasets.Dataset":
    from datasets.exceptions import DatasetsError

    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _load_saved(path, split)
        return _load_described(str(path), split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{path}: cannot be read as a dataset, split {split!r} ({error})") from error


def _load_hub(name: str, split: str) -> "datasets.Dataset":
    from datasets.exceptions import DatasetsError

    try:
        return _load_described(name, split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"{name}: is no file or folder here, and cannot be loaded from the hub, split {split!r} "
            f"({error}); check the name, the split and the connection"
        ) from error


def _load_saved(path: Path, split: str) -> "datasets.Dataset":
    import datasets

    loaded = datasets.load_from_disk(str(path))
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    if split not in splits:
        raise ValueError(f"it holds {', '.join(splits)}; choose one with split")
    _check_inside([file["filename"] for file in splits[split].cache_files], path)
    return splits[split]


def _load_described(name: str, split: str) -> "datasets.Dataset":
    """The split of a folder or hub dataset, of the files that its card names, or else of all its data files.

    Raises ValueError, before any of them is read, for files outside of it, and for archives; and what
    `datasets.load_dataset` does.
    """
    import datasets

    files = [file for found in (datasets.load_dataset_builder(name).config.data_files or {}).values() for file in found]
    archives = [file for file in files if "::" in file or file.endswith(_ARCHIVES)]
    if archives:
        raise ValueError(f"{archives[0]} is an archive; unpack it, and give the files")
    _check_inside([file for file in files if not file.startswith("hf://")], Path(name))
    return datasets.load_dataset(name, split=split)


def _check_inside(files: Sequence[str], folder: Path) -> None:
    """Raise ValueError if a dataset itself names a file outside of its folder. Links that the user made are fine."""
    names = (os.path.abspath(folder), folder.resolve())  # `datasets` resolves links to the folder, but none in it
    for file in files:
        if "://" in file or not any(Path(os.path.abspath(file)).is_relative_to(name) for name in names):
            raise ValueError(
                f"the dataset names {file}, which lies outside of it; name that file itself if you trust it"
            )
