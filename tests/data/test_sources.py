"""Files, folders and the hub, opened as rows that say where they stand."""

import json
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from notus.data.sources import Part, open_source, parts, read_file, read_rows

ROWS = [{"a": "x"}, {"a": "äé🙂"}, {"a": "[1, {]"}]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(path: Path | str, split: str = "train") -> list[tuple[str, Any]]:
    source = open_source(str(path), split)
    rows = list(read_rows(source, source.rows[:], range(len(source.rows))))
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

    @pytest.mark.parametrize("line", ['{"a": 1', "nonsense", b'{"a": "\xff"}', "[" * 100_000])
    def test_malformed_line_is_named(self, tmp_path: Path, line: str | bytes) -> None:
        line = line if isinstance(line, bytes) else line.encode()
        path = write(tmp_path / "rows.jsonl", b'{"a": 1}\n\n' + line + b"\n")
        with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not (valid JSON|UTF-8)"):
            read(path)

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ('[\n{"a": 1},\n{"a": }\n]', 3),
            ('[{"a": 1}\n{"a": 2}]', 2),
            ('[{"a": 1},\n', 2),
            ("[1]\n\n2", 3),
            ("[" * 100_000, 1),
        ],
    )
    def test_malformed_array_names_the_line(self, tmp_path: Path, text: str, line: int) -> None:
        with pytest.raises(ValueError, match=rf"rows.json, line {line}: not JSON"):
            read(write(tmp_path / "rows.json", text))

    def test_digest_follows_the_content(self, tmp_path: Path) -> None:
        first = open_source(str(write(tmp_path / "a.jsonl", '{"a": 1}'))).digest
        assert open_source(str(write(tmp_path / "b.jsonl", '{"a": 1}'))).digest == first
        assert open_source(str(write(tmp_path / "a.jsonl", '{"a": 2}'))).digest != first


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
        assert read(tmp_path / "folder") == [(f"{tmp_path / 'folder'}, row 1", {"a": "x"})]

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

    def test_unknown_type(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a.csv: files of type .csv are not read; convert to .jsonl, .json"):
            read(write(tmp_path / "a.csv", "a"))

    def test_split_of_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a.jsonl: has no split 'test'"):
            read(write(tmp_path / "a.jsonl", "{}"), "test")


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
