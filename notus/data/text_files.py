"""JSON and CSV files, plain or packed with gzip, as records: where each one's bytes stand, and what they say.

A file is scanned once for the byte ranges of its records. Each is parsed where it is needed, so that rows can be read
at random, in parallel, and with little memory. Only one record is ever held, and none may be longer than `MAX_RECORD`.
"""

import codecs
import contextlib
import csv
import dataclasses
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn, cast

from notus.runtime.files import replacing

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
PACKED = ".gz"
MAX_RECORD = 64 * 2**20  # bytes; what has no end, as a quote that is never closed, must not fill the memory
_MAX_EXPANSION = 200  # times its packed size; text packs to a tenth, a gzip bomb to a thousandth
_CHUNK = 2**20
_LONGEST_TOKEN = 16  # characters of JSON other than strings and numbers: `-Infinity`, `\\ud83d\\ude00`
_MOST_DIGITS = 300  # of an integer that a float can hold
_BOM = b"\xef\xbb\xbf"
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_INDEX = "Unnamed: 0"  # pandas' own name for the first column that its `to_csv` writes without one: the row numbers
_ROW_NUMBER = re.compile(r"(\d+(\.0)?)?", re.ASCII)

csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))  # its own limit is 128 kB, for the whole process

Layout = Literal["lines", "array", "table"]


class Record(NamedTuple):
    """A record of a file: where its bytes start, the line they start on (from 1), and the bytes themselves."""

    start: int
    line: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A JSON or CSV file whose layout is known.

    Attributes:
        path: where its bytes are. For a .gz file that was unpacked, that is another path than its name.
        name: what errors call it.
        layout: one JSON value a line, one JSON array of values, or a table with a header.
        delimiter, header: of a table: what separates the fields, and their names.
        indexed: of a table: the header has no name for the first column, which so must hold row numbers.
    """

    path: Path
    name: str
    layout: Layout
    delimiter: str = ","
    header: tuple[str, ...] = ()
    indexed: bool = False

    def place(self, number: int, line: int) -> str:
        """Say where record `number` (from 1) stands, for error messages."""
        return f"{self.name}, row {number} (line {line})" if self.layout == "array" else f"{self.name}, line {line}"

    def scan(self, stream: IO[bytes]) -> Iterator[Record]:
        """Yield the records of the file, open at its beginning.

        Raises ValueError, naming the file and line, where the end of a record cannot be found.
        """
        if self.layout == "lines":
            return _lines(stream, self.name)
        if self.layout == "array":
            return _elements(stream, self.name)
        records = _table(stream, self.name, self.delimiter)
        next(records)  # the header
        return records

    def parse(self, data: bytes, *, any_numbers: bool = False) -> Any:
        """Return the value of a record's bytes: of a table {column: text}.

        `any_numbers` lets NaN, Infinity and numbers of any size pass.

        Raises ValueError, without the place, for what is not UTF-8 and not valid JSON or not as the header says.
        """
        try:  # a BOM that stands before a later line comes of joining files
            text = data.decode("utf-8" if self.layout == "table" else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start} of the row; convert the file") from error
        return self._fields(text) if self.layout == "table" else parse_json(text, data, any_numbers=any_numbers)

    def _fields(self, text: str) -> dict[str, str]:
        fields = next(csv.reader([text], delimiter=self.delimiter, strict=True))
        if len(fields) != len(self.header):
            count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            raise ValueError(f"has {count}, but the header has {len(self.header)}; correct or remove the row")
        if self.indexed and not _ROW_NUMBER.fullmatch(fields[0]):
            raise ValueError(
                f"the first column has no name and holds {fields[0][:40]!r}, which is no row number; name the column "
                "in the header"
            )
        return dict(zip(self.header, fields, strict=True))


def parse_json(text: str, data: bytes, *, any_numbers: bool = False) -> Any:
    """Return the value of JSON; `data` is the same in bytes. Raises ValueError for what is not valid.

    That is also what Python's own parser lets pass: halves of surrogate pairs, which no tokenizer can read, and without
    `any_numbers` NaN, Infinity and numbers that are too large for a float.
    """
    try:
        value = (_LENIENT if any_numbers else _DECODER).decode(text)
        if _SURROGATE.search(data):  # rare, so that the second pass costs nothing
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1}"
    except UnicodeEncodeError:
        reason = "half of a surrogate pair, as \\ud83d alone"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # our own, or Python's for thousands of digits
        reason = str(error).split(";")[0]
    else:
        return value
    raise ValueError(f"not valid JSON ({reason}); correct or remove the row")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON, write null")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, parse_int=_integer)
_LENIENT = json.JSONDecoder()
# Finds where a value ends, whatever its numbers are: they are judged when the row is parsed.
_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)


def is_packed(path: Path) -> bool:
    """Whether the file's name says that it is packed with gzip."""
    return path.name.lower().endswith(PACKED)


def open_stream(path: Path) -> IO[bytes]:
    """Open the file for reading; a packed one is unpacked on the way."""
    return cast(IO[bytes], gzip.open(path, "rb")) if is_packed(path) else path.open("rb")


def find_layout(stream: IO[bytes], name: str, suffix: str) -> TextFile:
    """Return what the file is, from its suffix and its beginning; `stream` stands at the beginning again.

    Raises ValueError for a table without a usable header.
    """
    found = TextFile(Path(name), name, "lines")
    if suffix in _DELIMITERS:
        found = _with_header(stream, name, _DELIMITERS[suffix])
    elif suffix == ".json" and stream.read(4096).removeprefix(_BOM).lstrip().startswith(b"["):
        found = dataclasses.replace(found, layout="array")  # else JSON lines, which the name is also used for
    stream.seek(0)
    return found


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ValueError where gzip finds, within the block, that the file is damaged."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); pack it again") from error


def unpack(path: Path, target: Path) -> None:
    """Unpack the gzip file `path` into `target`, which appears whole or not at all.

    Raises ValueError if it is damaged, or grows as no text does; OSError as `replacing`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    most = max(MAX_RECORD, _MAX_EXPANSION * path.stat().st_size)
    with replacing(target) as temporary, temporary.open("wb") as file, reading(path), gzip.open(path, "rb") as stream:
        for chunk in iter(partial(stream.read, _CHUNK), b""):
            file.write(chunk)
            if file.tell() > most:
                raise ValueError(f"{path}: unpacks to over {_MAX_EXPANSION} times its size; unpack it if you trust it")


def _bounded(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield the lines of a file."""
    for number, line in enumerate(iter(partial(stream.readline, MAX_RECORD + 1), b""), start=1):
        if number == 1 and (line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line[:200]):
            raise ValueError(f"{name}: is not UTF-8 text (perhaps UTF-16); save it as UTF-8 (in Excel: 'CSV UTF-8')")
        if number == 1 and b"\r" in line[:-1] and not line.endswith(b"\n"):  # no LF in the whole file, but CR
            raise ValueError(f"{name}: its lines end in CR alone, as on old Macs; save it with line ends LF or CRLF")
        if len(line) > MAX_RECORD:
            raise ValueError(f"{name}, line {number}: longer than {MAX_RECORD // 2**20} MiB; correct or remove it")
        yield line


def _lines(stream: IO[bytes], name: str) -> Iterator[Record]:
    """Yield each line that is not blank."""
    position = 0
    for number, line in enumerate(_bounded(stream, name), start=1):
        if line.strip():
            yield Record(position, number, line)
        position += len(line)


def _table(stream: IO[bytes], name: str, delimiter: str) -> Iterator[Record]:
    """Yield each record of a CSV file, its header first. A field in quotes may hold line breaks (RFC 4180)."""
    taken: list[bytes] = []  # the lines of the record that is read

    def lines() -> Iterator[str]:
        for line in _bounded(stream, name):
            taken.append(line)
            # Latin-1 leaves quotes, delimiters and line breaks as they are. The fields are decoded when parsed.
            yield (line if position else line.removeprefix(_BOM)).decode("latin-1")

    position, number = 0, 1
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}, line {number}: not valid CSV ({_csv_fault(error)}") from error
        if fields is None:
            return
        data = b"".join(taken)
        if fields:
            yield Record(position, number, data)
        position, number = position + len(data), number + len(taken)
        taken.clear()


def _csv_fault(error: csv.Error) -> str:
    """Say what is wrong, and the remedy; of a line break, `csv` names one for Python programs."""
    if "new-line character" in str(error):
        return "a CR outside of quotes); put the field in quotes, or end lines with LF or CRLF"
    return f"{error}); correct the quotes"


def _with_header(stream: IO[bytes], name: str, delimiter: str) -> TextFile:
    """Return the table with the names of its columns."""
    first = next(_table(stream, name, delimiter), None)
    if first is None:
        raise ValueError(f"{name}: holds no rows; give a header and at least one row")
    try:
        text = first.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: the header is not UTF-8 at byte {error.start}; convert the file") from error
    header = next(csv.reader([text], delimiter=delimiter, strict=True))
    others = [other for other in ";\t,|" if len(header) == 1 and other in header[0]]
    if others:
        raise ValueError(f"{name}: the fields are separated by {others[0]!r}, not {delimiter!r}; convert the file")
    indexed = not header[0] and len(header) > 1
    header = [_index_name(header[1:]), *header[1:]] if indexed else header
    if "" in header:
        raise ValueError(f"{name}: column {header.index('') + 1} of the header has no name; name it, or remove it")
    repeated = [column for column in header if header.count(column) > 1]
    if repeated:
        raise ValueError(f"{name}: the header has {repeated[0]!r} twice; rename one of these columns")
    return TextFile(Path(name), name, "table", delimiter, tuple(header), indexed)


def _index_name(others: list[str]) -> str:
    """Return a name for a first column without one that no other column has."""
    numbers = (f"{_INDEX}.{number}" for number in range(1, len(others) + 1))
    return next(name for name in (_INDEX, *numbers) if name not in others)


class _Window:
    """The part of a file that is looked at, as Latin-1 text: each character is one byte, and JSON's are unchanged."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream, self.name = stream, name
        self.text, self.at = "", 0  # what comes before `at` is done with
        self.start, self.line = 0, 1  # where the text stands in the file, and on which line `at` does

    def move(self, to: int) -> None:
        """Go to this position of the text."""
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def grow(self) -> bool:
        """Forget what is done with, and read more: as much again as there is. False at the end of the file."""
        self.start += self.at
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > MAX_RECORD:
            size = MAX_RECORD // 2**20
            raise ValueError(f"{self.name}, line {self.line}: no JSON value ends within {size} MiB; correct the file")
        more = self.stream.read(max(_CHUNK, len(self.text))).decode("latin-1")
        self.text += more
        return bool(more)

    def next_character(self) -> str:
        """Go past white space, and return what stands there: nothing at the end of the file."""
        while True:
            match = _JSON_SPACE.match(self.text, self.at)
            assert match is not None
            self.move(match.end())
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def value_end(self) -> int:
        """Return where the JSON value at `at` ends."""
        while True:
            try:
                length = _SCANNER.raw_decode(self.text, self.at)[1] - self.at
            except json.JSONDecodeError as error:
                offset = error.pos - self.at
                if not self._may_be_cut(error) or not self.grow():
                    raise self.error(error.msg, self.at + offset) from error
            except RecursionError as error:
                raise self.error("nested too deeply", self.at) from error
            else:
                # Else more of a number may follow: of `-2.5e-3`, `-2.` reads as -2.
                if self.at + length < len(self.text) - _LONGEST_TOKEN or not self.grow():
                    return self.at + length

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the end of the text, in the middle of a value, may be what is wrong."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _LONGEST_TOKEN

    def error(self, reason: str, position: int) -> ValueError:
        """Return the error of what stands at this position of the text."""
        line = self.line + self.text.count("\n", self.at, position)
        return ValueError(f"{self.name}, line {line}: not JSON ({reason}); correct the file")


def _elements(stream: IO[bytes], name: str) -> Iterator[Record]:
    """Yield each element of the file's one JSON array."""
    window = _Window(stream, name)
    window.grow()
    window.move(window.text.index("[") + 1)  # after a BOM or blank lines
    found = window.next_character()
    while found != "]":
        end = window.value_end()
        yield Record(window.start + window.at, window.line, window.text[window.at : end].encode("latin-1"))
        window.move(end)
        if (found := window.next_character()) == ",":
            window.move(window.at + 1)
            window.next_character()
        elif found != "]":
            raise window.error("expected ',' or ']'", window.at)
    window.move(window.at + 1)
    if window.next_character():
        raise window.error("expected the end of the file", window.at)
