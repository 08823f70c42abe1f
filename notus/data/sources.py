"""Files, saved datasets, hub datasets and rows in memory -> rows, each with its place for error messages.

There are two ways to read. `open_source` (or `open_rows`) and `read_rows` are for training data: random access, in
parallel, with little memory for a million rows. Text files are indexed once by byte ranges, and their rows are parsed
where they are tokenised; all else is memory-mapped Arrow. `read_file` and `read_hub` are for everything else, and yield
one row after the other.

Nothing is decoded: what a dataset declares as images, audio or video stays the bytes and the path that are stored,
since decoding would open the paths and addresses that the data name.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from notus.data import text_files
from notus.data.messages import listed
from notus.data.text_files import TextFile
from notus.runtime.files import replacing

if TYPE_CHECKING:  # imported where it is used: curation and judges start without it
    import datasets

SUFFIXES = (*text_files.SUFFIXES, *(suffix + text_files.PACKED for suffix in text_files.SUFFIXES), ".parquet")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_RANGE = np.dtype([("start", "i8"), ("line", "i8"), ("length", "i4"), ("number", "i4"), ("file", "i4")])
_BATCH_ROWS = 256
_LARGE = 2**26  # bytes of a file that takes longer to write than a clock takes to tick
_PIECE_BYTES = 2**20  # of Arrow data that become Python objects at a time
_ARROW_VERSION = 1  # of what `_to_arrow` writes, so that a change finds no older file in the cache
_JSON_COLUMN = "json"
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)

Placed = tuple[str, Any]  # where a row stands, for error messages, and the row
Columns: TypeAlias = Callable[[list[str]], list[str]]  # which of these columns to read


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture: a path or hub id, its split, and the share of its rows to take (2: twice)."""

    path: str
    split: str = "train"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        name: what errors call it.
        digest: changes with the content, and with the columns that are read.
        rows: the rows as undecoded Arrow data, so that `rows.map` hands `read_rows` its batches without making Python
            objects of them: of text files the records' byte ranges, of a list one JSON string each.
        unread: columns that `columns` did not pick. Of text files it is empty: they are read whole.
        texts: the text files that byte ranges point into.
        as_json: the rows are JSON strings.
    """

    name: str
    digest: str
    rows: "datasets.Dataset"
    unread: tuple[str, ...] = ()
    texts: tuple[TextFile, ...] = ()
    as_json: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out `rows`, which may be gigabytes: `map` sends the source to its workers, and the rows apart."""
        return {**vars(self), "rows": None}


def is_mixture(source: object) -> bool:
    """Whether a list is one of sources, {path, split, weight} each, and not of rows."""
    known = {field.name for field in dataclasses.fields(Part)}
    return (
        isinstance(source, Sequence)
        and not isinstance(source, str | bytes)
        and len(source) > 0
        and all(isinstance(entry, Mapping) and "path" in entry and set(entry) <= known for entry in source)
    )


def parts(source: str | Path | Sequence[Mapping[str, Any]]) -> list[Part]:
    """The parts of a source as configured: a path or hub id, or a list of {path, split, weight}; `~` is expanded.

    Raises ValueError for an empty list, unknown keys and weights that are not positive numbers.
    """
    if isinstance(source, str | Path):
        return [Part(os.path.expanduser(source))]
    if not source:
        raise ValueError("the list of data sources is empty; give at least one {path: ...}")
    return [_part(entry, number) for number, entry in enumerate(source, start=1)]


def _part(entry: Mapping[str, Any], number: int) -> Part:
    known = [field.name for field in dataclasses.fields(Part)]
    if not isinstance(entry, Mapping) or "path" not in entry or not set(entry) <= set(known):
        raise ValueError(f"data source {number} is {entry!r}, but must be {{path, split, weight}}, with at least path")
    given = {key: value for key, value in entry.items() if value is not None}
    part = Part(**{**given, "path": os.path.expanduser(str(entry["path"]))})
    weight = part.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"data source {number} ({part.path}): weight is {weight!r}, but must be a number above 0")
    return part


def data_suffix(name: str | Path) -> str | None:
    """Return which of `SUFFIXES` a file's name ends with, in capitals or not; None if it is none of them."""
    lower = str(name).lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be a dataset's on the hub."""
    return data_suffix(name) is None and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name))


# ---- for training data: random access ----


def open_source(
    name: str, split: str = "train", *, columns: Columns | None = None, cache_dir: str | Path | None = None
) -> Source:
    """Open a file, a folder that `datasets` saved or can load, or a hub dataset.

    Args:
        name: a path, in which `~` is expanded, or a hub id. Files: see `SUFFIXES`.
        split: of a folder or a hub dataset; a file is the split "train".
        columns: returns which of the columns to read; None reads all. Of text files the rows are read whole.
        cache_dir: where Parquet files are kept as Arrow, and packed text files unpacked, under a name of their content;
            None: `notus` in the cache folder of `datasets`.

    Raises:
        ValueError: naming the source and the remedy, for what is missing, empty or unreadable, and for a split that is
            not there.
        OSError: the cache cannot be written.
    """
    name = os.path.expanduser(name)
    path = Path(name)
    if path.is_file():
        if split != "train":
            raise ValueError(f"{path}: has no split {split!r}, a file is the split 'train'; leave split out")
        _check_suffix(path)
        source = _open_files(name, [path], columns, _cache(cache_dir))
    elif path.is_dir():
        source = _open_folder(path, split, columns, _cache(cache_dir))
    elif is_hub_id(name):
        source = _open_dataset(name, _load_hub(name, split), columns)
    elif path.exists():
        raise ValueError(f"{name}: is a pipe or a device; write the rows to a file first")
    else:
        raise ValueError(f"{name}: there is no such file or folder; check the path")
    return _not_empty(source)


def open_rows(
    rows: "datasets.Dataset | Sequence[Mapping[str, Any]]", name: str = "rows", *, columns: Columns | None = None
) -> Source:
    """Open rows that are in memory: a `datasets.Dataset`, or a list of mappings whose types need not agree.

    NumPy's arrays and numbers become lists and numbers, and tuples lists.

    Args:
        rows: the rows. The columns that a Dataset's format hides are not read.
        name: what errors call them.
        columns: returns which of the columns to read; None reads all.

    Raises:
        ValueError: naming the row and the key, for values that JSON has not, and for what is neither of the two.
    """
    import datasets

    if isinstance(rows, datasets.Dataset):
        if rows.format["type"] == "custom":
            raise ValueError(f"{name}: the dataset has a transform, which would not be applied; use map instead")
        return _not_empty(_open_dataset(name, rows.select_columns(rows.format["columns"]), columns))
    if isinstance(rows, datasets.DatasetDict):
        raise ValueError(f"{name}: holds the splits {listed(rows)}; give one of them")
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise ValueError(f"{name}: is a {type(rows).__name__}; give a datasets.Dataset or a list of mappings")
    return _not_empty(_open_list(rows, name, columns))


def read_rows(source: Source, batch: pa.Table, indices: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for each row of a batch of `source.rows`, made only when it is asked for.

    In place of a row that cannot be read stands a ValueError, whose message is without the place. Rows and lines count
    from 1.

    Args:
        source: the source.
        batch: some rows of `source.rows`, as `map` hands them over.
        indices: their indices.
    """
    if source.texts:
        yield from _text_rows(source.texts, batch)
        return
    rows = map(_from_json, batch.column(_JSON_COLUMN)) if source.as_json else _python_rows(batch)
    for index, row in zip(indices, rows, strict=True):
        yield f"{source.name}, row {index + 1}", row


def _not_empty(source: Source) -> Source:
    if len(source.rows) == 0:
        raise ValueError(f"{source.name}: holds no rows; give a source with at least one")
    return source


def _cache(given: str | Path | None) -> Path:
    import datasets

    return Path(given or Path(datasets.config.HF_DATASETS_CACHE) / "notus")


def _picked(name: str, columns: Columns | None, found: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the columns to read and the others, both in their order."""
    if len(set(found)) < len(found):
        twice = next(column for column in found if found.count(column) > 1)
        raise ValueError(f"{name}: has the column {twice!r} twice; rename one of them")
    picked = set(found if columns is None else columns(found))
    if found and not picked & set(found):
        raise ValueError(f"{name}: none of its columns ({listed(found)}) is one that is read; map their names")
    return [column for column in found if column in picked], tuple(each for each in found if each not in picked)


def _open_files(name: str, files: Sequence[Path], columns: Columns | None, cache: Path) -> Source:
    digests = [file_digest(file) for file in files]
    if data_suffix(files[0]) == ".parquet":
        return _open_parquet(name, files, digests, columns, cache)
    texts = [_text_file(file, digest, cache) for file, digest in zip(files, digests, strict=True)]
    ranges = np.concatenate([_index(text, number) for number, text in enumerate(texts)])
    layouts = [(digest, text.layout, text.delimiter) for digest, text in zip(digests, texts, strict=True)]
    digest = _digest_of(layouts)
    table = pa.table({column: np.ascontiguousarray(ranges[column]) for column in _RANGE.names or ()})
    return Source(name, digest, _dataset(table, digest), texts=tuple(texts))


def _digest_of(decides: Any) -> str:
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file. A process reads a large one once, unless its size or times change.

    A small one may be replaced by another of its size before the file system's clock ticks.
    """
    status = path.stat()
    state = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _known_digest(path, state) if status.st_size >= _LARGE else _read_digest(path)


@functools.lru_cache(maxsize=10_000)
def _known_digest(path: Path, state: tuple[int, ...]) -> str:
    return _read_digest(path)


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dataset(table: pa.Table, digest: str) -> "datasets.Dataset":
    """Return the table as a Dataset, under a fingerprint that need not be computed from it."""
    import datasets

    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=digest[:32]).with_format("arrow")


def _check_suffix(path: Path) -> None:
    if data_suffix(path) is None:
        found = path.suffix or "(none)"
        raise ValueError(f"{path}: files of type {found} are not read; convert to {', '.join(SUFFIXES)}")


# ---- text files ----


def _text_file(path: Path, digest: str, cache: Path) -> TextFile:
    suffix = (data_suffix(path) or "").removesuffix(text_files.PACKED)
    place = path
    if text_files.is_packed(path):
        place = cache / f"unpacked-{digest[:32]}{suffix}"
        if not place.is_file():
            text_files.unpack(path, place)
    with place.open("rb") as stream:
        return dataclasses.replace(text_files.find_layout(stream, str(path), suffix), path=place)


def _index(text: TextFile, file: int) -> np.ndarray:
    """Return the byte ranges of the records, `_RANGE` each."""
    with text.path.open("rb") as stream:
        records = enumerate(text.scan(stream), start=1)
        found = ((start, line, len(data), number, file) for number, (start, line, data) in records)
        return np.fromiter(found, dtype=_RANGE)


def _text_rows(texts: Sequence[TextFile], batch: pa.Table) -> Iterator[Placed]:
    columns = [batch.column(name).to_pylist() for name in _RANGE.names or ()]
    with contextlib.ExitStack() as stack:
        streams: dict[int, io.BufferedIOBase] = {}
        for start, line, length, number, file in zip(*columns, strict=True):
            text = texts[file]
            if file not in streams:
                streams[file] = stack.enter_context(text.path.open("rb"))
            streams[file].seek(start)
            yield text.place(number, line), _parsed(text, streams[file].read(length))


def _parsed(text: TextFile, data: bytes, any_numbers: bool = False) -> Any:
    try:
        return text.parse(data, any_numbers=any_numbers)
    except ValueError as error:
        return error


# ---- rows in memory ----


def _open_list(rows: Sequence[Mapping[str, Any]], name: str, columns: Columns | None) -> Source:
    names: dict[Any, None] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, row {number}: is a {type(row).__name__}; give a mapping of columns to values")
        names.update(dict.fromkeys(row))
    wanted, unread = _picked(name, columns, list(names))
    digest, chunks = hashlib.sha256(b"rows"), []
    for start in range(0, len(rows), _BATCH_ROWS):
        chunk = [
            _to_json(row, set(wanted), f"{name}, row {number}")
            for number, row in enumerate(rows[start : start + _BATCH_ROWS], start=start + 1)
        ]
        digest.update(b"\n".join(chunk) + b"\n")  # JSON holds no line breaks
        chunks.append(pa.array(chunk, pa.large_binary()))
    table = pa.table({_JSON_COLUMN: pa.chunked_array(chunks, pa.large_binary())})
    return Source(name, digest.hexdigest(), _dataset(table, digest.hexdigest()), unread, as_json=True)


def _to_json(row: Mapping[str, Any], wanted: set[str], place: str) -> bytes:
    for key in row:
        if not isinstance(key, str):
            raise ValueError(f"{place}: the key {key!r} is a {type(key).__name__}; keys must be strings")
    found = {}
    for key in filter(wanted.__contains__, row):
        value = row[key]
        try:
            found[key] = _encode(_plain(value))
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: key {key!r} holds half of a surrogate pair; correct the text") from error
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ValueError(f"{place}: key {key!r} ({type(value).__name__}): {reason}") from error
    return b"{" + b", ".join([_encode(key) + b": " + value for key, value in found.items()]) + b"}"


def _encode(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


def _plain(value: Any) -> Any:
    """Return a value as JSON has it. Raise ValueError for what it has not."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.ndarray | np.bool_ | np.integer | np.floating):
        return _plain(value.tolist()) if value.dtype.kind in "biuOUS" or value.dtype.char in "efd" else _no_json(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is a {type(key).__name__}; keys must be strings")
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return _no_json(value)


def _no_json(value: object) -> Any:
    raise ValueError(f"holds a {type(value).__name__}; give strings, numbers, true, false, None, lists and mappings")


def _from_json(scalar: pa.Scalar) -> Any:
    return json.loads(scalar.as_py())


# ---- Arrow: Parquet files, datasets ----


def _open_parquet(
    name: str, files: Sequence[Path], digests: Sequence[str], columns: Columns | None, cache: Path
) -> Source:
    import datasets

    found, unread = [], dict[str, None]()
    for file, digest in zip(files, digests, strict=True):
        with _parquet(file) as parquet:
            wanted, rest = _picked(str(file), columns, parquet.schema_arrow.names)
            target = cache / f"parquet-{_digest_of([_ARROW_VERSION, digest, wanted])[:32]}.arrow"
            if not target.is_file():
                _to_arrow(parquet, file, wanted, target)
        found.append(_load_arrow(target, file))
        unread.update(dict.fromkeys(rest))
    try:
        rows = datasets.concatenate_datasets(found) if len(found) > 1 else found[0]
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"{name}: its files differ in their columns ({_reason(error)}); give them one by one"
        ) from error
    return Source(name, _digest_of([digests, rows.column_names]), rows.with_format("arrow"), tuple(unread))


def _to_arrow(parquet: pa.parquet.ParquetFile, path: Path, columns: Sequence[str], target: Path) -> None:
    """Write columns of a Parquet file to an Arrow file without their metadata, which would have them decoded."""
    found = parquet.schema_arrow
    schema = pa.schema([(name, _storage(found.field(name).type)) for name in columns])
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(target) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for batch in _batches(parquet, path, columns):
            stored = [_as_type(column, field.type) for column, field in zip(batch.columns, schema, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(stored, schema=schema))


def _as_type(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast a column if it has another type: Arrow's cast fails for nested fields that are null throughout."""
    return column if column.type == kind else column.cast(kind)


def _storage(kind: pa.DataType) -> pa.DataType:
    """Return the type that `datasets` can hold values of this type in."""
    if isinstance(kind, pa.DictionaryType):
        return _storage(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.JsonType):
        return kind.storage_type
    return kind


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[pa.parquet.ParquetFile]:
    """Open a Parquet file. Raise ValueError where Arrow cannot read it within the block."""
    try:  # page by page, not a whole column of a row group at a time
        with pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as parquet:
            yield parquet
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable Parquet file ({_reason(error)}); write it again")


def _batches(parquet: pa.parquet.ParquetFile, path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows in batches of some megabytes."""
    groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
    size = sum(group.total_byte_size for group in groups) / max(1, parquet.metadata.num_rows)
    rows = int(min(_BATCH_ROWS, max(1, 32 * _PIECE_BYTES / max(1, size))))
    try:
        yield from parquet.iter_batches(rows, columns=list(columns))
    except OSError as error:  # as Arrow has it for data that do not unpack
        raise _unreadable(path, error) from error


def _load_arrow(target: Path, path: Path) -> "datasets.Dataset":
    import datasets

    try:
        return datasets.Dataset.from_file(str(target))
    except pa.ArrowException as error:
        raise ValueError(f"{target}: is damaged ({_reason(error)}); remove it") from error
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{path}: has a column that cannot be read ({_reason(error)}); leave it out of the file"
        ) from error


def _open_dataset(name: str, rows: "datasets.Dataset", columns: Columns | None) -> Source:
    wanted, unread = _picked(name, columns, rows.column_names)
    rows = rows.select_columns(wanted).with_format("arrow")
    return Source(name, _content_digest(rows), rows, unread)


class _Hasher(io.RawIOBase):
    """A file that keeps nothing but the digest of what is written to it."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(memoryview(data).cast("B"))


def _content_digest(rows: "datasets.Dataset") -> str:
    """Return the digest of the rows of a Dataset in Arrow format.

    Its fingerprint does not follow the content: `map` computes it from the text of the function alone.
    """
    hasher, writer = _Hasher(), None
    for table in rows.iter(_BATCH_ROWS):
        table = table.replace_schema_metadata(None).combine_chunks()
        writer = writer or pa.ipc.new_stream(pa.PythonFile(hasher, mode="w"), table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return hasher.sha256.hexdigest()


def _python_rows(table: pa.Table) -> Iterator[Any]:
    """Yield the rows as mappings, or as a ValueError what cannot be one; few of them exist at a time."""
    step = max(1, _PIECE_BYTES * table.num_rows // max(1, table.nbytes))
    holders = {field.name: field.type for field in table.schema if _holds_json(field.type)}
    for start in range(0, table.num_rows, step):
        piece = table.slice(start, step)
        try:
            rows = piece.to_pylist()
        except (ValueError, OverflowError):  # one of them is not UTF-8, say
            rows = [_python_row(piece.slice(at, 1)) for at in range(piece.num_rows)]
        yield from (_with_json(row, holders) for row in rows) if holders else rows


def _python_row(table: pa.Table) -> Any:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error.reason} at byte {error.start} of a string); correct or remove the row")
    except (ValueError, OverflowError) as error:
        return ValueError(f"cannot be read ({error}); correct or remove the row")


def _holds_json(kind: pa.DataType) -> bool:
    """Whether values of this type hold JSON as text: `datasets.Json`, for values whose types do not agree."""
    children = [kind.field(number).type for number in range(kind.num_fields)]
    return isinstance(kind, pa.JsonType) or any(map(_holds_json, children))


def _with_json(row: Any, holders: Mapping[str, pa.DataType]) -> Any:
    """Parse the JSON that a row holds as text."""
    try:
        return (
            row
            if isinstance(row, ValueError)
            else {**row, **{key: _parse_in(row[key], holders[key]) for key in holders}}
        )
    except ValueError as error:
        return error


def _parse_in(value: Any, kind: pa.DataType) -> Any:
    if value is None or not _holds_json(kind):
        return value
    if isinstance(kind, pa.JsonType):
        return text_files.parse_json(value, value.encode())
    if isinstance(kind, pa.StructType):
        return {name: _parse_in(part, kind.field(name).type) for name, part in value.items()}
    return [_parse_in(part, kind.field(0).type) for part in value]


# ---- one row after the other ----


def read_file(
    path: Path, columns: Sequence[str] = (), *, also: Sequence[str] = (), any_numbers: bool = False
) -> Iterator[Placed]:
    """Return an iterator of (place, row) over a file with one of `SUFFIXES`.

    Args:
        path: the file.
        columns: the only ones to read of a Parquet file, if it has them all.
        also: columns to read besides, if it has them.
        any_numbers: let NaN, Infinity and numbers of any size pass in JSON, for files that others write so.

    Raises:
        ValueError: naming the file and line, if it cannot be read.
    """
    _check_suffix(path)
    suffix = data_suffix(path) or ""
    return _stream_parquet(path, columns, also) if suffix == ".parquet" else _stream_text(path, suffix, any_numbers)


def read_hub(name: str, split: str, columns: Sequence[str] = (), *, also: Sequence[str] = ()) -> Iterator[Placed]:
    """Yield (place, row) over a hub dataset's split; arguments and errors as in `read_file`."""
    rows = _load_hub(name, split)
    tables = rows.select_columns(_wanted(columns, rows.column_names, also)).with_format("arrow").iter(_BATCH_ROWS)
    yield from _numbered(f"{name}, split {split}", tables)


def _stream_text(path: Path, suffix: str, any_numbers: bool) -> Iterator[Placed]:
    with text_files.reading(path), text_files.open_stream(path) as stream:
        text = text_files.find_layout(stream, str(path), suffix.removesuffix(text_files.PACKED))
        for number, (_, line, data) in enumerate(text.scan(stream), start=1):
            yield _raised(text.place(number, line), _parsed(text, data, any_numbers))


def _stream_parquet(path: Path, columns: Sequence[str], also: Sequence[str]) -> Iterator[Placed]:
    with _parquet(path) as parquet:
        batches = _batches(parquet, path, _wanted(columns, parquet.schema_arrow.names, also))
        yield from _numbered(str(path), (pa.Table.from_batches([batch]) for batch in batches))


def _wanted(columns: Sequence[str], found: list[str], also: Sequence[str]) -> list[str]:
    if not columns or not set(columns) <= set(found):
        return found
    return [*columns, *(name for name in also if name in found)]


def _numbered(place: str, tables: Iterable[pa.Table]) -> Iterator[Placed]:
    rows = (row for table in tables for row in _python_rows(table))
    for number, row in enumerate(rows, start=1):
        yield _raised(f"{place}, row {number}", row)


def _raised(place: str, row: Any) -> Placed:
    if isinstance(row, ValueError):
        raise ValueError(f"{place}: {row}") from row
    return place, row


# ---- folders and the hub ----


def _open_folder(path: Path, split: str, columns: Columns | None, cache: Path) -> Source:
    """Open a folder that `datasets` saved or can load.

    Its files are read here where they are of a known kind, because `datasets` would guess at the types of their values.
    """
    found = _load_folder(path, split)
    if isinstance(found, list):
        return _open_files(str(path), found, columns, cache)
    return _open_dataset(str(path), found, columns)


def files_of(path: Path, split: str) -> list[Path]:
    """Return the files that `open_source` reads of a file or folder here; none of a folder that it cannot open."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    try:
        if _is_saved(path):
            found = [Path(file["filename"]) for file in _load_saved(path, split).cache_files]
        else:
            found = [Path(file) for file in (_described(str(path)).config.data_files or {}).get(split, ())]
    except Exception:  # as in `_load_folder`, which says why
        return []
    return sorted(file for file in found if file.is_file())


def _load_folder(path: Path, split: str) -> "list[Path] | datasets.Dataset":
    import datasets

    try:
        if _is_saved(path):
            return _load_saved(path, split)
        builder = _described(str(path))
        return _plain_files(builder, split) or datasets.load_dataset(str(path), split=split, **_options(builder))
    except Exception as error:  # what a folder says of itself may fail in many ways
        raise ValueError(f"{path}: cannot be read as a dataset, split {split!r} ({_reason(error)})") from error


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _load_hub(name: str, split: str) -> "datasets.Dataset":
    import datasets

    try:
        builder = _described(name)
        return datasets.load_dataset(name, split=split, **_options(builder))
    except Exception as error:  # the hub's client, and what a dataset says of itself, fail in many ways
        raise ValueError(
            f"{name}: is no file or folder here, and cannot be loaded from the hub, split {split!r} "
            f"({_reason(error)}); check the name, the split and the connection"
        ) from error


def _reason(error: Exception) -> str:
    """Return in a line why Arrow or `datasets` failed."""
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None  # which says nothing
    return " ".join(str(cause or error).split()) or type(error).__name__


def _load_saved(path: Path, split: str) -> "datasets.Dataset":
    import datasets

    loaded = datasets.load_from_disk(str(path))
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    if split not in splits:
        raise ValueError(f"it holds {listed(splits)}; choose one with split")
    _check_inside([file["filename"] for file in splits[split].cache_files], path)
    return splits[split]


def _described(name: str) -> "datasets.DatasetBuilder":
    """Return what will read a folder or hub dataset: the files that its card names, or else all its data files.

    Raises ValueError, before any of them is read, for files outside of it, and for archives; and what
    `datasets.load_dataset_builder` does.
    """
    import datasets

    builder = datasets.load_dataset_builder(name)
    files = [file for found in (builder.config.data_files or {}).values() for file in found]
    archives = [file for file in files if "::" in file or file.endswith(_ARCHIVES)]
    if archives:
        raise ValueError(f"{archives[0]} is an archive; unpack it, and give the files")
    _check_inside([file for file in files if not file.startswith("hf://")], Path(name))
    return builder


def _options(builder: "datasets.DatasetBuilder") -> dict[str, Any]:
    """Return how `datasets` must read the files: of a CSV file, the text "None" is no missing value."""
    return {"na_filter": False} if hasattr(builder.config, "na_filter") else {}


def _plain_files(builder: "datasets.DatasetBuilder", split: str) -> list[Path]:
    """Return the files of a folder's split if all are of a kind that is read here, without settings of their own."""
    config = builder.config
    files = [Path(file) for file in (config.data_files or {}).get(split, ())]
    default = type(config)(name=config.name, data_files=config.data_files, data_dir=config.data_dir)
    own = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in ("version", "description", "sep")
        and getattr(config, field.name) != getattr(default, field.name)
    ]
    kinds = {data_suffix(file) == ".parquet" if data_suffix(file) else None for file in files}
    return files if not own and len(kinds) == 1 and None not in kinds else []


def _check_inside(files: Sequence[str], folder: Path) -> None:
    """Raise ValueError if a dataset itself names a file outside of its folder. Links that the user made are fine."""
    names = (os.path.abspath(folder), folder.resolve())  # `datasets` resolves links to the folder, but none in it
    for file in files:
        if "://" in file or not any(Path(os.path.abspath(file)).is_relative_to(name) for name in names):
            raise ValueError(
                f"the dataset names {file}, which lies outside of it; name that file itself if you trust it"
            )
