"""What a dataset declares as images, audio or video is never decoded, fetched or opened, nor its metadata trusted."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from notus.data.sources import Source, open_rows, open_source, read_file, read_hub, read_rows

KINDS = {"image": datasets.Image(), "audio": datasets.Audio(), "video": datasets.Video()}


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def web() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on this machine, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def raw_rows(values: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": f"p{number}", "media": value} for number, value in enumerate(values)]


def declared(kind: str, values: list[Any]) -> datasets.Dataset:
    """Rows whose column `media` is declared as that kind, as they are stored."""
    storage = [{"bytes": value if isinstance(value, bytes) else None, "path": value if isinstance(value, str) else None}
               for value in values]  # fmt: skip
    media = pa.array(storage, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"prompt": [f"p{number}" for number in range(len(values))], "media": media})
    features = datasets.Features({"prompt": datasets.Value("string"), "media": KINDS[kind]})
    return datasets.Dataset(datasets.table.InMemoryTable(table.cast(features.arrow_schema)))


def write_parquet(path: Path, rows: datasets.Dataset) -> Path:
    """Write them as they are, with the metadata that declares them: `to_parquet` would fetch what they name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = rows.features.arrow_schema
    assert b"huggingface" in schema.metadata
    pyarrow.parquet.write_table(rows.data.table.cast(schema), path)
    return path


def of_parquet(at: Path, rows: datasets.Dataset) -> Source:
    return open_source(str(write_parquet(at / "rows.parquet", rows)))


def of_folder(at: Path, rows: datasets.Dataset) -> Source:
    write_parquet(at / "folder" / "rows.parquet", rows)
    return open_source(str(at / "folder"))


def of_saved(at: Path, rows: datasets.Dataset) -> Source:
    """Another dataset is saved, and these rows put in its place: `save_to_disk` would open what they name."""
    datasets.Dataset.from_dict({"x": list(range(len(rows)))}).save_to_disk(at / "saved")
    (file,) = (at / "saved").glob("*.arrow")
    with pa.ipc.new_stream(str(file), rows.features.arrow_schema) as writer:
        writer.write_table(rows.data.table.cast(rows.features.arrow_schema))
    (at / "saved" / "dataset_info.json").write_text(json.dumps({"features": rows.features.to_dict()}))
    return open_source(str(at / "saved"))


def of_arrow_folder(at: Path, rows: datasets.Dataset) -> Source:
    (at / "arrows").mkdir()
    with pa.ipc.new_stream(str(at / "arrows" / "rows.arrow"), rows.features.arrow_schema) as writer:
        writer.write_table(rows.data.table.cast(rows.features.arrow_schema))
    return open_source(str(at / "arrows"))


def of_memory(at: Path, rows: datasets.Dataset) -> Source:
    return open_rows(rows)


WAYS: dict[str, Callable[[Path, datasets.Dataset], Source]] = {
    "parquet": of_parquet,
    "folder": of_folder,
    "saved": of_saved,
    "arrow folder": of_arrow_folder,
    "memory": of_memory,
}
every_way = pytest.mark.parametrize("way", WAYS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def rows_of(source: Source) -> list[Any]:
    return [row for _, row in read_rows(source, source.rows[:], range(len(source.rows)))]


def test_the_server_notices_a_decoded_image(web: tuple[str, list[str]]) -> None:
    rows = declared("image", [f"{web[0]}/a.png"])
    with pytest.raises(FileNotFoundError):
        rows[0]
    assert web[1]


@every_kind
@every_way
def test_addresses_are_not_asked(way: str, kind: str, tmp_path: Path, web: tuple[str, list[str]]) -> None:
    address, asked = web
    urls = [f"{address}/{number}.png" for number in range(3)]
    source = WAYS[way](tmp_path, declared(kind, urls))
    expected = [{"prompt": f"p{number}", "media": {"bytes": None, "path": url}} for number, url in enumerate(urls)]
    assert rows_of(source) == expected
    assert not asked


@every_way
@pytest.mark.parametrize("workers", [None, 2])
def test_nor_by_map(way: str, workers: int | None, tmp_path: Path, web: tuple[str, list[str]]) -> None:
    source = WAYS[way](tmp_path, declared("image", [f"{web[0]}/{number}.png" for number in range(6)]))

    def urls(batch: pa.Table, indices: list[int]) -> pa.Table:
        found = [(place, row["media"]["path"]) for place, row in read_rows(source, batch, indices)]
        return pa.table({"place": [place for place, _ in found], "url": [url for _, url in found]})

    features = datasets.Features({"place": datasets.Value("string"), "url": datasets.Value("string")})
    mapped = source.rows.map(urls, with_indices=True, batched=True, batch_size=2, features=features,
                             remove_columns=source.rows.column_names, num_proc=workers)  # fmt: skip
    assert mapped.with_format(None)["url"][:] == [f"{web[0]}/{number}.png" for number in range(6)]
    assert [place.rsplit(" ", 1)[1] for place in mapped.with_format(None)["place"][:]] == list("123456")
    assert not web[1]


@every_kind
@every_way
def test_files_are_not_opened(way: str, kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    source = WAYS[way](tmp_path, declared(kind, [str(secret), str(tmp_path / "absent.png")]))
    assert [row["media"]["path"] for row in rows_of(source)] == [str(secret), str(tmp_path / "absent.png")]
    assert b"secret" not in repr(rows_of(source)).replace(str(secret), "").encode()


@every_way
def test_a_huge_image_is_left_as_it_is(way: str, tmp_path: Path) -> None:
    """20,000 x 20,000 pixels, at which PIL raises DecompressionBombError."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(buffer.getvalue())).load()
    assert (
        rows_of(WAYS[way](tmp_path, declared("image", [buffer.getvalue()])))[0]["media"]["bytes"] == buffer.getvalue()
    )


@every_way
def test_only_columns_that_are_picked_are_read(way: str, tmp_path: Path) -> None:
    asked = []

    def columns(names: list[str]) -> list[str]:
        asked.append(names)
        return ["prompt", "chosen"]

    rows = declared("image", [b"x" * 10_000])
    if way == "memory":
        source = open_rows(rows, columns=columns)
    else:
        made = WAYS[way](tmp_path, rows)
        source = open_source(made.name, columns=columns)
    assert asked == [["prompt", "media"]]
    assert source.rows.column_names == ["prompt"]
    assert source.unread == ("media",)
    assert rows_of(source) == [{"prompt": "p0"}]
    if way in ("parquet", "folder"):  # nor are their bytes copied to the cache
        copies = [path for path in (tmp_path / "cache").rglob("*.arrow") if b"x" * 10_000 not in path.read_bytes()]
        assert len(copies) == 1


def test_other_readers_decode_nothing_either(
    tmp_path: Path, web: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = declared("image", [f"{web[0]}/a.png"])
    expected = [{"prompt": "p0", "media": {"bytes": None, "path": f"{web[0]}/a.png"}}]
    assert [row for _, row in read_file(write_parquet(tmp_path / "rows.parquet", rows))] == expected
    builder = datasets.load_dataset_builder("parquet", data_files=str(tmp_path / "rows.parquet"))
    builder.config.data_files = {"train": ["hf://datasets/someone/pairs@main/rows.parquet"]}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert [row for _, row in read_hub("someone/pairs", "train")] == expected
    assert rows_of(open_source("someone/pairs")) == expected
    assert not web[1]


BAD_METADATA = [
    b"{", b"[]", b"3", b"null", b"\xff", b"", b'{"info": 3}', b'{"info": {"features": 3}}',
    b'{"info": {"features": {"a": 3}}}', b'{"info": {"features": {"a": {"_type": "Nope"}}}}',
    b'{"info": {"features": {"a": {"dtype": "nope", "_type": "Value"}}}}',
    b'{"info": {"features": {"b": {"dtype": "string", "_type": "Value"}}}}', b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("metadata", BAD_METADATA)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_malformed_metadata_of_parquet_is_not_needed(metadata: bytes, form: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    table = pa.table({"a": ["x"]}).replace_schema_metadata({b"huggingface": metadata})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    assert rows_of(open_source(str(folder if form == "folder" else folder / "rows.parquet"))) == [{"a": "x"}]
    assert [row for _, row in read_file(folder / "rows.parquet")] == [{"a": "x"}]


@pytest.mark.parametrize("metadata", [data for data in BAD_METADATA if data not in (b"[]", b"") and b'"b"' not in data])
@pytest.mark.parametrize("file", ["dataset_info.json", "state.json"])
def test_malformed_metadata_of_a_saved_dataset_is_a_clear_error(metadata: bytes, file: str, tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"a": "x"}]).save_to_disk(tmp_path / "saved")
    described = json.dumps(json.loads(metadata)["info"]).encode() if metadata.startswith(b'{"info"') else metadata
    (tmp_path / "saved" / file).write_bytes(described)
    with pytest.raises(ValueError, match=r"saved: cannot be read as a dataset, split 'train' \(") as caught:
        open_source(str(tmp_path / "saved"))
    assert "\n" not in str(caught.value)


def test_a_column_twice_is_an_error(tmp_path: Path) -> None:
    table = pa.table([["x"], ["y"]], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: has the column 'a' twice"):
        open_source(str(tmp_path / "rows.parquet"))


def test_columns_that_have_nothing_to_read(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: none of its columns \(a, b\) is one that is read"):
        open_source(str(tmp_path / "rows.parquet"), columns=lambda names: [])


def test_a_damaged_page_of_parquet_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.table({"a": [f"text {n}" * 9 for n in range(2000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[200:1200] = b"\x55" * 1000
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows.parquet: not a readable Parquet file"):
        rows_of(open_source(str(path)))
    with pytest.raises(ValueError, match=r"rows.parquet: not a readable Parquet file"):
        list(read_file(path))
    assert not list((tmp_path / "cache").rglob("*arrow*"))


def test_texts_that_are_not_utf8_are_errors_of_their_rows(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff", b"fine"], pa.binary()).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"a": texts}), tmp_path / "rows.parquet")
    first, second, third = rows_of(open_source(str(tmp_path / "rows.parquet")))
    assert (first, third) == ({"a": "good"}, {"a": "fine"})
    assert isinstance(second, ValueError)
    assert "not UTF-8" in str(second)
    with pytest.raises(ValueError, match=r"rows.parquet, row 2: not UTF-8"):
        list(read_file(tmp_path / "rows.parquet"))


def test_types_that_datasets_has_not(tmp_path: Path) -> None:
    """Categories are texts. JSON values are parsed, as `datasets` does. A map is an error, unless it is not read."""
    categories = pa.array(["b", "a", "b"]).dictionary_encode()
    values = pa.array(['{"x": 1}', None, '[1, "2"]'], pa.json_(pa.string()))
    maps = pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64()))
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.table({"a": categories, "b": values, "c": maps}), path)
    source = open_source(str(path), columns=lambda names: ["a", "b"])
    assert rows_of(source) == [{"a": "b", "b": {"x": 1}}, {"a": "a", "b": None}, {"a": "b", "b": [1, "2"]}]
    with pytest.raises(ValueError, match=r"rows.parquet: has a column that cannot be read"):
        open_source(str(path))


def test_json_within_lists_is_parsed() -> None:
    calls = [[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": [2]}}], None]
    rows = datasets.Dataset.from_dict({"calls": calls}, on_mixed_types="use_json")
    assert "Json" in repr(rows.features)
    assert rows_of(open_rows(rows)) == [{"calls": calls[0]}, {"calls": None}]
