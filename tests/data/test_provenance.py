"""Where rows came from and how they were rated: from the data's columns to `Rows`, and into no digest."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from toys import toy_tokenizer

from notus.data import tokenize as dataset_module
from notus.data.dataset import PROVENANCE, Rows
from notus.data.formats import find_form
from notus.data.tokenize import DropReport, load_pairs
from notus.training.reference import digest_of_rows


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(source: Any, num_workers: int = 1) -> tuple[datasets.Dataset, DropReport]:
    return load_pairs(source, toy_tokenizer(), max_length=64, max_prompt_length=32, num_workers=num_workers)


RATED = {
    "source": "flan",
    "instruction": "Q",
    "chosen_response": "X",
    "rejected_response": "Y",
    "chosen_avg_rating": 4.5,
    "rejected_avg_rating": 2.0,
}
EXPECTED = {"source": "flan", "chosen_rating": 4.5, "rejected_rating": 2.0}


def told(rows: datasets.Dataset) -> list[dict[str, Any]]:
    return list(rows.select_columns(list(PROVENANCE)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_kept_past_dropped_rows(tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "BATCH_ROWS", 2)
    empty, other = {**RATED, "chosen_response": ""}, {**RATED, "source": "sharegpt"}
    path = write_rows(tmp_path / "a.jsonl", [empty, RATED, empty, other])
    for _ in range(2):  # made, then from the cache
        rows, report = loaded(path, num_workers=num_workers)
        assert report.kept == 2
        assert told(rows) == [EXPECTED, {**EXPECTED, "source": "sharegpt"}]


def test_from_arrow_with_columns_of_these_names(tmp_path: Path) -> None:
    datasets.Dataset.from_list([RATED]).to_parquet(tmp_path / "a.parquet")
    assert told(loaded(tmp_path / "a.parquet")[0]) == [EXPECTED]


def test_mixed_with_rows_that_have_none(tmp_path: Path) -> None:
    paths = [
        write_rows(tmp_path / "rated.jsonl", [RATED]),
        write_rows(tmp_path / "plain.jsonl", [{"prompt": "Q", "chosen": "X", "rejected": "Y"}]),
    ]
    rows = Rows(loaded([{"path": str(path)} for path in paths])[0])
    assert rows.sources == ["flan", Rows.UNKNOWN_SOURCE]
    np.testing.assert_array_equal(rows.ratings, [[4.5, 2.0], [np.nan, np.nan]])


def test_no_part_of_what_is_computed(tmp_path: Path) -> None:
    bare = {key: value for key, value in RATED.items() if key in find_form(RATED, "dpo")}
    one, other = (loaded(write_rows(tmp_path / f"{n}.jsonl", [row]))[0] for n, row in enumerate((RATED, bare)))
    assert digest_of_rows(Rows(one).digests()) == digest_of_rows(Rows(other).digests())


def test_code_of_the_columns_is_part_of_the_caches_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", [RATED])
    loaded(path)
    read_bytes = Path.read_bytes

    def as_of_another_version(file: Path) -> bytes:
        return read_bytes(file) + (b"#" if file.name == "dataset.py" else b"")

    monkeypatch.setattr(Path, "read_bytes", as_of_another_version)
    loaded(path)
    assert len(list((tmp_path / "cache" / "notus").glob("rows-*"))) == 2
