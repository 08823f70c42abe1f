"""Files, folders and the hub, opened as rows that say where they stand."""

import csv
import datetime
import gzip
import json
import math
import os
import pickle
import random
import re
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from notus.data import text_files
from notus.data.sources import Part, Source, is_mixture, open_rows, open_source, parts, read_file, read_rows

ROWS = [{"a": "x"}, {"a": "äé🙂"}, {"a": "[1, {]"}]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# What is not JSON, and what the error says of it.
BAD_LINES: dict[str | bytes, str] = {
    '{"a": 1': "not valid JSON (Expecting ',' delimiter at character",
    "nonsense": "not valid JSON (Expecting value at character 1)",
    '{"a": 1} {"a": 2}': "not valid JSON (Extra data at character 10)",
    '{"a": "\t"}': "not valid JSON (Invalid control character at at character 8)",
    b'{"a": "\xff"}': "not UTF-8 at byte 7 of the row",
    '{"a": 1}'.encode("utf-16"): "not UTF-8 at byte 0 of the row",
    "[" * 100_000: "not valid JSON (nested too deeply)",
    '{"a": ' + "1" * 5000 + "}": "not valid JSON (a number of 5000 digits)",
    '{"a": ' + "1" * 400 + "}": "not valid JSON (a number of 400 digits)",
    '{"a": 1e400}': "not valid JSON (the number 1e400 is too large)",
    '{"a": NaN}': "not valid JSON (NaN is no JSON, write null)",
    '{"a": -Infinity}': "not valid JSON (-Infinity is no JSON, write null)",
    '{"a": "\\ud83d"}': "not valid JSON (half of a surrogate pair",
}
NUMBERS_AND_TEXTS = [
    reason for reason in BAD_LINES.values() if "number" in reason or "null" in reason or "half" in reason
]
NUMBERS_AND_TEXTS += ["not UTF-8 at byte 7 of the row"]


def encoded(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def rows_of(source: Source) -> list[tuple[str, Any]]:
    return list(read_rows(source, source.rows[:], range(len(source.rows))))


def read(path: Path | str, split: str = "train") -> list[tuple[str, Any]]:
    source = open_source(str(path), split)
    rows = rows_of(source)
    if Path(path).is_file():
        assert list(read_file(Path(path))) == rows
    return rows


def on_hub(monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """A hub whose datasets have these data files."""
    builder = SimpleNamespace(config=SimpleNamespace(data_files={"train": list(files)}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class TestJson:
    def test_lines_keep_their_numbers_over_blank_ones(self, tmp_path: Path) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        path = write(tmp_path / "rows.jsonl", f"\ufeff{lines[0]}\n\n{lines[1]}\r\n  \n{lines[2]}")
        expected = [(f"{path}, line {line}", row) for line, row in zip([1, 3, 5], ROWS, strict=True)]
        assert read(path) == expected

    @pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
    @pytest.mark.parametrize("indent", [None, 2])
    def test_array(self, tmp_path: Path, start: str, indent: int | None) -> None:
        path = write(tmp_path / "rows.json", start + json.dumps(ROWS, ensure_ascii=False, indent=indent) + "\n")
        first = 1 + start.count("\n")
        lines = [first + (1 + 3 * row if indent else 0) for row in range(3)]
        places = [f"{path}, row {row} (line {line})" for row, line in enumerate(lines, start=1)]
        assert read(path) == list(zip(places, ROWS, strict=True))

    def test_json_file_of_lines(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.json", '{"a": 1}\n{"a": 2}\n')
        assert read(path) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 2", {"a": 2})]

    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
    @pytest.mark.parametrize("line", BAD_LINES)
    def test_a_malformed_line_is_named_and_the_others_are_read(
        self, tmp_path: Path, line: str | bytes, packed: bool
    ) -> None:
        content = b'{"a": 1}\n\n' + encoded(line) + b'\n{"a": 2}\n'
        path = write(tmp_path / "rows.jsonl", content)
        if packed:
            path = write(tmp_path / "rows.jsonl.gz", gzip.compress(content))
        self.check_bad_row(path, [f"{path}, line {number}" for number in (1, 3, 4)], BAD_LINES[line])

    @pytest.mark.parametrize("value", [line for line, reason in BAD_LINES.items() if reason in NUMBERS_AND_TEXTS])
    def test_a_malformed_element_that_ends_is_named_and_the_others_are_read(
        self, tmp_path: Path, value: str | bytes
    ) -> None:
        path = write(tmp_path / "rows.json", b'[{"a": 1},\n' + encoded(value) + b',\n{"a": 2}]')
        places = [f"{path}, row {number} (line {number})" for number in (1, 2, 3)]
        self.check_bad_row(path, places, BAD_LINES[value])

    def check_bad_row(self, path: Path, places: list[str], reason: str) -> None:
        first, second, third = rows_of(open_source(str(path)))
        assert (first, third) == ((places[0], {"a": 1}), (places[2], {"a": 2}))
        assert second[0] == places[1]
        assert isinstance(second[1], ValueError)
        assert reason in str(second[1])
        assert "\n" not in str(second[1])
        with pytest.raises(ValueError, match=re.escape(f"{places[1]}: {second[1]}")):
            list(read_file(path))

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ('[\n{"a": 1},\n{"a": }\n]', 3),
            ('[{"a": 1}\n{"a": 2}]', 2),
            ('[{"a": 1},\n', 2),
            ("[1]\n\n2", 3),
            ("[" * 100_000, 1),
            ("[1,\n2,\n]", 3),
            ('[\n"a', 2),
            ('["\n"]', 1),
            ("[1,\n\nnul", 3),
            ("[1\n,\n-", 3),
            ('[1,{"a":\n"b","c"', 2),
        ],
    )
    def test_malformed_array_names_the_line(self, tmp_path: Path, text: str, line: int) -> None:
        with pytest.raises(ValueError, match=rf"rows.json, line {line}: not JSON"):
            read(write(tmp_path / "rows.json", text))

    def test_digest_follows_the_content(self, tmp_path: Path) -> None:
        first = open_source(str(write(tmp_path / "a.jsonl", '{"a": 1}'))).digest
        assert open_source(str(write(tmp_path / "b.jsonl", '{"a": 1}'))).digest == first
        assert open_source(str(write(tmp_path / "a.jsonl", '{"a": 2}'))).digest != first

    def test_numbers_that_json_has_not_where_they_are_asked_for(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl", f'{{"a": [-Infinity, 1e400, {10**400}]}}\n{{"a": {"1" * 5000}}}')
        rows = read_file(path, any_numbers=True)
        assert next(rows)[1] == {"a": [-math.inf, math.inf, 10**400]}
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not valid JSON \(Exceeds the limit \(4300 digits\)"):
            next(rows)

    def test_whole_surrogate_pairs_and_escapes_are_texts(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl", r'{"a": "\ud83d\ude00 \u00e4 \\ud83d"}')
        assert read(path)[0][1] == {"a": "\U0001f600 \u00e4 \\ud83d"}

    @pytest.mark.parametrize("name", ["rows.JSONL", "rows.ndjson", "rows.Jsonl.GZ", "rows.ndjson.gz"])
    def test_other_names_of_json_lines(self, tmp_path: Path, name: str) -> None:
        content = b'{"a": 1}\n{"a": 2}\n'
        path = write(tmp_path / name, gzip.compress(content) if name.lower().endswith("gz") else content)
        assert read(path) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 2", {"a": 2})]

    @pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
    def test_an_array_is_read_piece_by_piece(self, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """As Python's own parser reads it whole, wherever a piece ends."""
        monkeypatch.setattr(text_files, "_CHUNK", chunk)
        rows = [
            {"a": 'x\\"]},{', "b": [1, -2.5e-3, None]},
            12345,
            -2.5e-07,
            "\U0001f600 \u00e4",
            [],
            {},
            True,
            None,
            1e-09,
            [[1], {}],
        ]
        text = "[\n" + " ,\n\t".join(json.dumps(row, ensure_ascii=bool(n % 2)) for n, row in enumerate(rows)) + "\n] \n"
        path = write(tmp_path / "rows.json", text)
        for first in range(1, 90):  # the first piece ends within each of the values
            monkeypatch.setattr(text_files, "_CHUNK", first)
            assert [row for _, row in read_file(path)] == rows
        monkeypatch.setattr(text_files, "_CHUNK", chunk)
        assert [row for _, row in read(path)] == rows
        for cut in range(1, len(text) - 3):
            write(path, text[:cut])
            with pytest.raises(ValueError, match=r"rows.json, line \d+: not JSON|holds no rows"):
                read(path)

    def test_a_row_without_end_does_not_fill_the_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_files, "MAX_RECORD", 1000)
        monkeypatch.setattr(text_files, "_CHUNK", 100)
        long = json.dumps({"a": "x" * 2000})
        path = write(tmp_path / "rows.jsonl", '{"a": 1}\n' + long)
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2: longer than"):
            read(path)
        path = write(tmp_path / "rows.json", f'[{{"a": 1}},\n{long}]')
        with pytest.raises(ValueError, match=r"rows.json, line 2: no JSON value ends within"):
            read(path)

    def test_a_source_travels_to_workers_without_its_rows(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": 2}\n')
        source = open_source(str(path))
        sent = pickle.loads(pickle.dumps(source))
        assert sent.rows is None
        assert list(read_rows(sent, source.rows[1:2], [1])) == [(f"{path}, line 2", {"a": 2})]


class TestPacked:
    def test_array_and_table(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.json.gz", gzip.compress(json.dumps(ROWS).encode()))
        assert [row for _, row in read(path)] == ROWS
        assert read(path)[2][0] == f"{path}, row 3 (line 1)"
        path = write(tmp_path / "rows.csv.gz", gzip.compress(b'a,b\n1,"x\ny"\n'))
        assert read(path) == [(f"{path}, line 2", {"a": "1", "b": "x\ny"})]

    def test_it_is_unpacked_once(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl.gz", gzip.compress(b'{"a": 1}\n'))
        first = open_source(str(path), cache_dir=tmp_path / "mine")
        (copy,) = (tmp_path / "mine").iterdir()
        assert copy.read_bytes() == b'{"a": 1}\n'
        assert open_source(str(path), cache_dir=tmp_path / "mine").digest == first.digest
        assert list((tmp_path / "mine").iterdir()) == [copy]
        assert not (tmp_path / "cache").exists()
        write(path, gzip.compress(b'{"a": 2}\n'))
        assert open_source(str(path), cache_dir=tmp_path / "mine").digest != first.digest

    @pytest.mark.parametrize("damage", ["cut", "altered", "no gzip", "tail"])
    def test_a_damaged_file(self, tmp_path: Path, damage: str) -> None:
        lines = b"".join(b'{"a": %d}\n' % random.Random(n).getrandbits(60) for n in range(3000))
        packed = bytearray(gzip.compress(lines))
        packed[len(packed) // 2] ^= 0xFF if damage == "altered" else 0
        content = {"cut": packed[:-20], "altered": packed, "no gzip": lines, "tail": packed + b"tail"}[damage]
        path = write(tmp_path / "rows.jsonl.gz", bytes(content))
        for read_all in (lambda: open_source(str(path)), lambda: list(read_file(path))):
            with pytest.raises(ValueError, match=r"rows.jsonl.gz: not a whole gzip file|rows.jsonl.gz, line \d+: not"):
                read_all()
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]

    def test_a_bomb_neither_fills_the_memory_nor_the_disk(self, tmp_path: Path) -> None:
        """A file of 100 kB that would be 100 MB."""
        path = write(tmp_path / "rows.jsonl.gz", gzip.compress(b" " * 100 * 2**20))
        with pytest.raises(ValueError, match=r"rows.jsonl.gz: unpacks to over 200 times its size; unpack it if you"):
            open_source(str(path))
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        with pytest.raises(ValueError, match=r"rows.jsonl.gz, line 1: longer than 64 MiB"):
            list(read_file(path))


class TestTable:
    def test_quotes_line_breaks_and_numbers_of_lines(self, tmp_path: Path) -> None:
        text = '\ufeffprompt,"chosen","re,jected"\r\n007,"a ""b"", c\r\nd",\r\n\r\n"äé🙂", x ,1.50\r\nNone,NA,null'
        path = write(tmp_path / "rows.csv", text)
        assert read(path) == [
            (f"{path}, line 2", {"prompt": "007", "chosen": 'a "b", c\r\nd', "re,jected": ""}),
            (f"{path}, line 5", {"prompt": "äé🙂", "chosen": " x ", "re,jected": "1.50"}),
            (f"{path}, line 6", {"prompt": "None", "chosen": "NA", "re,jected": "null"}),
        ]

    def test_tabs(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.TSV", 'a\tb\n1,5\t"x\ty"\n5" disk\t\n')
        assert [row for _, row in read(path)] == [{"a": "1,5", "b": "x\ty"}, {"a": '5" disk', "b": ""}]

    def test_any_table_that_python_writes(self, tmp_path: Path) -> None:
        draw = random.Random(0)
        signs = ["a", "b", '"', ",", "\n", "\r\n", "\r", "\t", "ä", "🙂", " ", "\u2028", "\ufeff", ""]
        rows = [{name: "".join(draw.choices(signs, k=draw.randrange(9))) for name in ("x", "y")} for _ in range(500)]
        path = tmp_path / "rows.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["x", "y"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
        assert [row for _, row in read(path)] == rows

    def test_a_field_of_a_megabyte(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.csv", "a\n" + "x" * 2**20 + "\n")
        assert read(path)[0][1] == {"a": "x" * 2**20}

    @pytest.mark.parametrize(
        ("line", "reason"),
        [(b"1", "has 1 field, but the header has 2"), (b"1,2,3", "has 3 fields"), (b"1,\xff", "not UTF-8")],
    )
    def test_a_row_that_does_not_fit_is_named_and_the_others_are_read(
        self, tmp_path: Path, line: bytes, reason: str
    ) -> None:
        path = write(tmp_path / "rows.csv", b'a,b\n"x\ny",2\n' + line + b"\n3,4\n")
        first, second, third = rows_of(open_source(str(path)))
        assert (first[1], third) == ({"a": "x\ny", "b": "2"}, (f"{path}, line 5", {"a": "3", "b": "4"}))
        assert second[0] == f"{path}, line 4"
        assert reason in str(second[1])
        with pytest.raises(ValueError, match=rf"rows.csv, line 4: {reason}"):
            list(read_file(path))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "rows.csv: holds no rows; give a header"),
            ("a,b\n", "rows.csv: holds no rows; give a source"),
            ("a;b\n1;2\n", "the fields are separated by ';', not ','; convert the file"),
            ("a\tb\n1\t2\n", "separated by '\\\\t'"),
            ("a,a\n1,2\n", "the header has 'a' twice"),
            ("a,\n1,2\n", "column 2 of the header has no name"),
            (",a,\n0,1,2\n", "column 3 of the header has no name"),
            ('a,b\n1,"x" y\n', "line 2: not valid CSV"),
            ('a,b\n1,2\n1,"x\n\n', "line 3: not valid CSV"),
            ("a,b\r1,2\r", "rows.csv: its lines end in CR alone, as on old Macs; save it with line ends LF"),
            ("a,b\n1,2\r3,4\n", "line 2: not valid CSV .a CR outside of quotes.; put the field in quotes, or end"),
            (b"\xff,b\n1,2\n", "the header is not UTF-8 at byte 0"),
        ],
    )
    def test_refused(self, tmp_path: Path, text: str | bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_source(str(write(tmp_path / "rows.csv", text)))

    @pytest.mark.parametrize(("others", "name"), [("a", "Unnamed: 0"), ("Unnamed: 0,a", "Unnamed: 0.1")])
    def test_a_first_column_without_a_name_holds_row_numbers(self, tmp_path: Path, others: str, name: str) -> None:
        """As pandas' `to_csv` writes its index. Anything else there may be what is to be learned."""
        count = others.count(",")
        path = write(tmp_path / "rows.csv", f",{others}\n0{',5' * count},x\n1.0{',5' * count},y\n")
        assert [(row[name], row["a"]) for _, row in read(path)] == [("0", "x"), ("1.0", "y")]
        path = write(tmp_path / "rows.csv", f",{others}\nSay it{',5' * count},x\n")
        with pytest.raises(ValueError, match=r"line 2: the first column has no name and holds 'Say it', which"):
            list(read_file(path))

    def test_json_lines_that_end_in_cr_alone(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"rows.jsonl: its lines end in CR alone"):
            open_source(str(write(tmp_path / "rows.jsonl", '{"a": 1}\r{"a": 2}\r')))

    def test_a_first_column_of_pandas_name_may_hold_anything(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.csv", "Unnamed: 0,a\nx,y\n")
        assert read(path)[0][1] == {"Unnamed: 0": "x", "a": "y"}

    def test_commas_and_tabs_are_told_apart_by_the_digest(self, tmp_path: Path) -> None:
        """The same bytes are other rows."""
        text = "a,b\tc\n1,2\t3\n"
        first = open_source(str(write(tmp_path / "rows.csv", text)))
        second = open_source(str(write(tmp_path / "rows.tsv", text)))
        assert rows_of(first)[0][1] == {"a": "1", "b\tc": "2\t3"}
        assert rows_of(second)[0][1] == {"a,b": "1,2", "c": "3"}
        assert first.digest != second.digest

    def test_folder(self, tmp_path: Path) -> None:
        """What pandas would take for numbers and missing values are texts."""
        (tmp_path / "folder").mkdir()
        for name, value in (("a.csv", "007"), ("b.csv", "None")):
            write(tmp_path / "folder" / name, f"a,b\n{value},1\n")
        places = [f"{tmp_path / 'folder' / name}, line 2" for name in ("a.csv", "b.csv")]
        expected = [(places[0], {"a": "007", "b": "1"}), (places[1], {"a": "None", "b": "1"})]
        assert read(tmp_path / "folder") == expected

    def test_settings_of_a_card_are_left_to_datasets(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder" / "a.csv", "a|b\nNone|x\n")
        write(
            tmp_path / "folder" / "README.md",
            "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  delimiter: '|'\n---\n",
        )
        assert read(tmp_path / "folder") == [(f"{tmp_path / 'folder'}, row 1", {"a": "None", "b": "x"})]


class TestMemory:
    def test_types_need_not_agree(self) -> None:
        rows = [{"a": 1}, {"a": "x", "b": [1, "2", {"c": None}]}, {"a": {"z": 1, "y": 2.5}}]
        assert rows_of(open_rows(rows)) == [(f"rows, row {n}", row) for n, row in enumerate(rows, start=1)]
        (third,) = [row for _, row in rows_of(open_rows(rows, "mine"))][2:]
        assert list(third["a"]) == ["z", "y"]  # the order of keys is what a template prints
        assert rows_of(open_rows(rows, "mine"))[2][0] == "mine, row 3"

    def test_numpy_and_tuples(self) -> None:
        row = {
            "a": np.float32(0.5),
            "b": np.arange(3),
            "c": (np.int64(1), np.bool_(True)),
            "d": np.array(["x", None], object),
        }
        row |= {"e": np.str_("text"), "f": np.float64(2.5)}
        expected = {"a": 0.5, "b": [0, 1, 2], "c": [1, True], "d": ["x", None], "e": "text", "f": 2.5}
        assert rows_of(open_rows([row])) == [("rows, row 1", expected)]

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (datetime.datetime(2026, 1, 1), r"\(datetime\): holds a datetime; give strings, numbers"),
            (np.datetime64("2026-01-01"), r"holds a datetime64"),
            ([b"x"], "holds a bytes"),
            ({1: 2}, "the key 1 is a int; keys must be strings"),
            (float("nan"), "not JSON compliant"),
            (np.array([np.inf]), "not JSON compliant"),
            ("\ud83d", "half of a surrogate pair"),
            ({1, 2}, "holds a set"),
        ],
    )
    def test_what_json_has_not(self, value: Any, reason: str) -> None:
        with pytest.raises(ValueError, match=rf"rows, row 2: key 'a' .*{reason}"):
            open_rows([{"a": 1}, {"a": value}])
        assert rows_of(open_rows([{"b": 1, "a": value}], columns=lambda names: ["b"])) == [("rows, row 1", {"b": 1})]

    def test_deep_nesting(self) -> None:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(ValueError, match=r"rows, row 1: key 'a' .*nested too deeply"):
            open_rows([{"a": deep}])

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "rows: holds no rows"),
            ([{"a": 1}, 3], "rows, row 2: is a int; give a mapping"),
            ("a.jsonl", "rows: is a str; give a datasets.Dataset or a list"),
            ({"a": [1]}, "rows: is a dict; give"),
            (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}), "rows: holds the splits train"),
            (datasets.Dataset.from_dict({"a": []}), "rows: holds no rows"),
            (datasets.Dataset.from_dict({"a": [1]}).with_transform(lambda batch: batch), "has a transform"),
        ],
    )
    def test_refused(self, rows: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_rows(rows)

    def test_columns(self) -> None:
        rows = [{"a": 1, "b": 2}, {"c": 3, "a": 4}]
        source = open_rows(rows, columns=lambda names: [name for name in names if name != "b"])
        assert [row for _, row in rows_of(source)] == [{"a": 1}, {"c": 3, "a": 4}]
        assert source.unread == ("b",)

    def test_a_dataset_whose_rows_are_chosen_and_shuffled(self) -> None:
        rows = datasets.Dataset.from_list([{"a": n, "b": [{"c": str(n)}]} for n in range(1000)])
        chosen = rows.shuffle(seed=1).select(range(500, 520))
        source = open_rows(chosen)
        assert [row for _, row in rows_of(source)] == list(chosen)
        assert list(read_rows(source, source.rows[3:5], [3, 4])) == [(f"rows, row {n + 1}", chosen[n]) for n in (3, 4)]

    def test_hidden_columns_and_formats(self) -> None:
        rows = datasets.Dataset.from_dict({"a": [1.5], "b": ["x"]}).with_format("numpy", columns=["b"])
        assert rows_of(open_rows(rows)) == [("rows, row 1", {"b": "x"})]

    def test_digest_follows_the_content(self) -> None:
        table = datasets.Dataset.from_dict({"a": list(range(1000))})
        made = [
            open_rows(table).digest,
            open_rows(table.select(range(999, -1, -1))).digest,
            open_rows(table.select(range(999))).digest,
            open_rows(table.rename_column("a", "b")).digest,
            open_rows(table.to_list()).digest,
            open_rows([*table.to_list()[:-1], {"a": 0}]).digest,
        ]
        assert len(set(made)) == len(made)
        again = datasets.concatenate_datasets([table.select(range(300)), table.select(range(300, 1000))])
        assert open_rows(again).digest == made[0]
        assert open_rows(table.to_list()).digest == made[4]

    def test_map_with_workers(self, tmp_path: Path) -> None:
        """The rows of all kinds of sources reach workers with their own numbers."""
        rows = [{"a": f"text {n}"} for n in range(50)]
        file = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for source in (open_rows(rows), open_rows(datasets.Dataset.from_list(rows)), open_source(str(file))):
            for workers in (None, 2):
                found = source.rows.map(
                    _Texts(source), with_indices=True, batched=True, batch_size=7, num_proc=workers,
                    remove_columns=source.rows.column_names, features=_Texts.FEATURES,
                )  # fmt: skip
                assert found.with_format(None)["text"][:] == [row["a"] for row in rows]
                assert [place.split()[-1] for place in found.with_format(None)["place"][:]] == [
                    str(n) for n in range(1, 51)
                ]


class _Texts:
    FEATURES = datasets.Features({"place": datasets.Value("string"), "text": datasets.Value("string")})

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, batch: pa.Table, indices: list[int]) -> pa.Table:
        found = [(place, row["a"]) for place, row in read_rows(self.source, batch, indices)]
        return pa.table({"place": [place for place, _ in found], "text": [text for _, text in found]})


def test_few_rows_are_python_objects_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    slices = pa.Table.slice
    monkeypatch.setattr("notus.data.sources._PIECE_BYTES", 1000)
    source = open_rows(datasets.Dataset.from_dict({"a": ["x" * 300] * 10}))
    batch = source.rows[:]

    class Watched:
        """A table that counts the rows that become Python objects."""

        schema, num_rows, nbytes = batch.schema, batch.num_rows, batch.nbytes

        def slice(self, start: int, length: int) -> pa.Table:
            made.append(length)
            return slices(batch, start, length)

    rows = read_rows(source, Watched(), range(10))
    next(rows)
    assert made == [3]
    assert len(list(rows)) == 9
    assert made == [3] * 4


class TestArrow:
    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(ROWS).to_parquet(path)
        assert read(path) == [(f"{path}, row {number}", row) for number, row in enumerate(ROWS, start=1)]

    def test_unreadable_parquet(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"rows.parquet: not a readable Parquet file"):
            read(write(tmp_path / "rows.parquet", "no parquet"))

    def test_saved_dataset(self, tmp_path: Path) -> None:
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        assert read(tmp_path / "saved")[1] == (f"{tmp_path / 'saved'}, row 2", ROWS[1])

    def test_saved_splits(self, tmp_path: Path) -> None:
        splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        assert len(read(tmp_path / "saved")) == 3
        assert len(read(tmp_path / "saved", "test")) == 1
        with pytest.raises(ValueError, match=r"saved: .*split 'dev' \(it holds train, test; choose one"):
            read(tmp_path / "saved", "dev")

    def test_folder_of_files(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder" / "rows.jsonl", '{"a": "x"}\n')
        assert read(tmp_path / "folder") == [(f"{tmp_path / 'folder' / 'rows.jsonl'}, line 1", {"a": "x"})]

    def test_folder_of_parquet(self, tmp_path: Path) -> None:
        for name, rows in (("b", ROWS[1:]), ("a", ROWS[:1])):
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / "folder" / f"{name}.parquet")
        expected = [(f"{tmp_path / 'folder'}, row {number}", row) for number, row in enumerate(ROWS, start=1)]
        assert read(tmp_path / "folder") == expected
        datasets.Dataset.from_list([{"a": 1.5}]).to_parquet(tmp_path / "folder" / "c.parquet")
        with pytest.raises(ValueError, match=r"folder: its files differ in their columns"):
            read(tmp_path / "folder")

    def test_splits_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        for name in ("train", "test"):
            write(tmp_path / "folder" / f"{name}.jsonl", json.dumps({"a": name}))
            assert read(tmp_path / "folder", name)[0][1] == {"a": name}
        with pytest.raises(ValueError, match=r"folder: cannot be read as a dataset, split 'dev'"):
            read(tmp_path / "folder", "dev")

    def test_rows_of_a_folder_whose_types_do_not_agree(self, tmp_path: Path) -> None:
        """As they stand in the file: `datasets` would fail, or give each message the keys of all."""
        rows: list[Any] = [{"a": [{"role": "user", "x": 1}]}, {"a": "text"}, {"a": [{"role": "tool", "y": {"z": []}}]}]
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder" / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        assert [row for _, row in read(tmp_path / "folder")] == rows

    def test_parquet_becomes_arrow_once(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(ROWS).to_parquet(path)
        first = open_source(str(path), cache_dir=tmp_path / "mine")
        (copy,) = (tmp_path / "mine").iterdir()
        written = copy.stat().st_mtime_ns
        assert open_source(str(path), cache_dir=tmp_path / "mine").digest == first.digest
        assert copy.stat().st_mtime_ns == written
        copy.write_bytes(copy.read_bytes()[:100])
        with pytest.raises(ValueError, match=rf"{copy.name}: is damaged .*; remove it"):
            open_source(str(path), cache_dir=tmp_path / "mine")

    def test_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load_dataset(name: str, *, split: str) -> datasets.Dataset:
            asked.append((name, split))
            return datasets.Dataset.from_list(ROWS)

        on_hub(monkeypatch, "hf://datasets/someone/pairs@main/test.parquet")
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert read("someone/pairs", "test")[0] == ("someone/pairs, row 1", ROWS[0])
        assert asked == [("someone/pairs", "test")]

    def test_hub_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset_builder(name: str) -> None:
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
        with pytest.raises(ValueError, match=r"someone/pairs: is no file.*'train' \(no route\); check the name"):
            read("someone/pairs")


class TestConfined:
    """What a dataset says of itself leads to no file outside of it, and to no archive."""

    @pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
    def test_a_card_that_names_a_file_elsewhere(self, absolute: bool, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        secret = write(tmp_path / "secret.jsonl", '{"a": "secret"}\n')
        write(folder / "rows.jsonl", '{"a": "x"}\n')
        self.card(folder, str(secret) if absolute else "../secret.jsonl")
        with pytest.raises(ValueError, match=r"secret.jsonl, which lies outside of it"):
            read(folder)
        self.card(folder, "rows.jsonl")
        assert [row for _, row in read(folder)] == [{"a": "x"}]

    def card(self, folder: Path, file: str) -> None:
        split = f"  data_files:\n  - split: train\n    path: {file}\n"
        write(folder / "README.md", f"---\nconfigs:\n- config_name: default\n{split}---\n")

    def test_links_that_the_user_made_are_followed(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        elsewhere = write(tmp_path / "elsewhere.jsonl", '{"a": "x"}\n')
        (tmp_path / "folder" / "train.jsonl").symlink_to(elsewhere)
        (tmp_path / "link").symlink_to(tmp_path / "folder")
        datasets.Dataset.from_list([{"a": "x"}]).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved link").symlink_to(tmp_path / "saved")
        for name in ("folder", "link", "link/../folder", "saved", "saved link"):
            assert [row for _, row in read(tmp_path / name)] == [{"a": "x"}], name

    def test_a_saved_dataset_that_names_a_file_elsewhere(self, tmp_path: Path) -> None:
        for name in ("mine", "other"):
            datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / name)
        state = tmp_path / "other" / "state.json"
        write(state, state.read_text().replace('"data-', '"../mine/data-'))
        with pytest.raises(ValueError, match=r"mine/data-.*, which lies outside of it"):
            read(tmp_path / "other")

    def test_a_hub_dataset_that_names_a_file_of_this_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_hub(monkeypatch, "hf://datasets/someone/pairs@main/a.jsonl", str(tmp_path / "secret.jsonl"))
        monkeypatch.setattr(datasets, "load_dataset", None)
        with pytest.raises(ValueError, match=r"someone/pairs: .*secret.jsonl, which lies outside of it"):
            read("someone/pairs")

    @pytest.mark.parametrize("scheme", ["local://", "file://", "http:/"])
    def test_a_dataset_whose_card_names_a_file_by_its_scheme(
        self, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_hub(monkeypatch, f"{scheme}{tmp_path / 'secret.jsonl'}")
        monkeypatch.setattr(datasets, "load_dataset", None)
        with pytest.raises(ValueError, match="which lies outside of it"):
            read("someone/pairs")

    @pytest.mark.parametrize("file", ["zip://a.jsonl::hf://datasets/someone/pairs@main/a.zip", "hf://a/b.tar.gz"])
    def test_archives_on_the_hub_are_not_read(self, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
        on_hub(monkeypatch, file)
        monkeypatch.setattr(datasets, "load_dataset", None)
        with pytest.raises(ValueError, match=f"{file} is an archive; unpack it"):
            read("someone/pairs")

    def test_archives_are_not_unpacked(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        with zipfile.ZipFile(folder / "data.zip", "w") as archive:
            archive.writestr("../../outside.jsonl", '{"a": "x"}\n')
        with pytest.raises(ValueError, match="folder: cannot be read as a dataset"):
            read(folder)
        (tmp_path / "tar").mkdir()
        with tarfile.open(tmp_path / "tar" / "data.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("../../outside.json"))
        with pytest.raises(ValueError, match=r"data.tar is an archive; unpack it"):
            read(tmp_path / "tar")
        assert not list(tmp_path.rglob("outside*"))


class TestRefused:
    @pytest.mark.parametrize("name", ["missing.jsonl", "data/missing.parquet", "/no/such/folder"])
    def test_missing_path_is_not_looked_up_on_the_hub(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "load_dataset", None)
        with pytest.raises(ValueError, match=rf"{name}: there is no such file or folder"):
            read(name)

    @pytest.mark.parametrize(
        ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.json", "")]
    )
    def test_empty_file(self, tmp_path: Path, name: str, text: str) -> None:
        with pytest.raises(ValueError, match=rf"{name}: holds no rows"):
            read(write(tmp_path / name, text))

    @pytest.mark.parametrize("name", ["a.xlsx", "a.gz", "a.jsonl.zst", "a.parquet.gz", "a"])
    def test_unknown_type(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=rf"{name}: files of type \S+ are not read; convert to .jsonl, .ndjson"):
            read(write(tmp_path / name, "a"))

    def test_split_of_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a.jsonl: has no split 'test'"):
            read(write(tmp_path / "a.jsonl", "{}"), "test")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "rows.jsonl", "{}")
    assert rows_of(open_source("~/rows.jsonl")) == [(f"{path}, line 1", {})]
    assert parts("~/rows.jsonl") == [Part(str(path))]
    assert parts([{"path": "~/rows.jsonl", "weight": 2}]) == [Part(str(path), weight=2)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([{"path": "a"}], True),
        ([{"path": "a", "split": "test", "weight": 2}, {"path": "b"}], True),
        ([{"path": "a"}, {"prompt": "b"}], False),
        ([{"path": "a", "prompt": "b"}], False),
        ([{"prompt": "a", "completion": "b"}], False),
        ([], False),
        ("a.jsonl", False),
        (datasets.Dataset.from_list([{"path": "a"}]), False),
    ],
)
def test_is_mixture(source: Any, expected: bool) -> None:
    assert is_mixture(source) is expected


def test_parts() -> None:
    assert parts("a.jsonl") == [Part("a.jsonl", "train", 1.0)]
    assert parts(Path("a.jsonl")) == [Part("a.jsonl", "train", 1.0)]
    listed = [{"path": "a.jsonl", "split": None}, {"path": "b", "split": "test", "weight": 2}]
    assert parts(listed) == [Part("a.jsonl", "train", 1.0), Part("b", "test", 2)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list of data sources is empty"),
        ([{"split": "train"}], "data source 1 is .* must be {path, split, weight}, with at least path"),
        ([{"path": "a"}, {"path": "b", "wieght": 2}], "data source 2 is .*wieght"),
        (["a.jsonl"], "data source 1 is 'a.jsonl', but must be"),
        ([{"path": "a", "weight": 0}], r"data source 1 \(a\): weight is 0, but must be a number above 0"),
        ([{"path": "a", "weight": "2"}], "weight is '2'"),
        ([{"path": "a", "weight": True}], "weight is True"),
        ([{"path": "a", "weight": float("inf")}], "weight is inf"),
    ],
)
def test_refused_parts(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts(source)


def test_a_nested_field_that_is_null_in_every_row_of_a_parquet_file(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "name": None}, {"role": "assistant", "name": None}]}] * 3
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    source = open_source(str(tmp_path / "rows.parquet"), cache_dir=tmp_path / "cache")
    assert [row for _, row in read_rows(source, source.rows.with_format("arrow")[:], range(3))] == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_in_utf_16_says_so(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(end.join(["prompt,chosen,rejected", "a,b,c", ""]).encode(encoding))
    with pytest.raises(ValueError, match=r"excel\.csv: is not UTF-8 text \(perhaps UTF-16\); save it as UTF-8"):
        open_source(str(path))


def test_a_pipe_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=r"rows\.csv: is a pipe or a device; write the rows to a file"):
        open_source(str(tmp_path / "rows.csv"))
