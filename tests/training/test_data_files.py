"""A finished run says so only as long as its data are those that it learned from."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from runs import config, write_pairs

from notus.config import Config
from notus.data import sources
from notus.training import data_files, dpo
from notus.training.data_files import FILES, check_unchanged, read_stamps, stamps
from notus.training.run_folder import holds_finished


def _noted(run: Config) -> Path:
    """A run's folder with the stamps of its files."""
    folder = Path(run.training.output_dir)
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps({"train": {}, "eval": None, FILES: stamps(run, read_stamps(folder))}))
    return folder


def _config(tmp_path: Path, **overrides: Any) -> Config:
    return config("dpo", tmp_path / "run", tmp_path / "model", tmp_path / "train.jsonl", **overrides)


def test_a_finished_run_with_changed_data_is_an_error(tmp_path: Path, model_folder: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    run = config("dpo", tmp_path / "run", model_folder, pairs, training__max_steps=1)
    assert dpo.run(run) == 0
    assert set(read_stamps(tmp_path / "run")["data.train"]) == {str(pairs)}
    assert dpo.run(run) == 0
    assert holds_finished(run)
    before = pairs.read_text()
    pairs.write_text(before.replace("a", "e"))
    with pytest.raises(ValueError, match=r"other contents of data\.train: .*resume=never"):
        dpo.run(run)
    pairs.write_text(before)
    assert dpo.run(run) == 0
    pairs.unlink()
    assert dpo.run(run) == 0


@pytest.mark.parametrize("key", ["data.train", "data.eval", "data.exclude", "data.chat_template"])
def test_every_file_that_decides_the_rows_is_compared(key: str, tmp_path: Path) -> None:
    names = {name: tmp_path / f"{name}.jsonl" for name in ("train", "eval", "exclude")}
    names["chat_template"] = tmp_path / "chat.jinja"
    for path in names.values():
        path.write_text("before")
    overrides = {f"data__{name}": str(path) for name, path in names.items() if name != "train"}
    run = _config(tmp_path, **overrides)
    folder = _noted(run)
    check_unchanged(run, folder)
    names[key.removeprefix("data.")].write_text("after!")
    with pytest.raises(ValueError, match=rf"other contents of {key}:"):
        check_unchanged(run, folder)


def test_the_files_that_are_read_of_a_folder_and_of_a_mixture_are_compared(tmp_path: Path) -> None:
    """Also where the run itself, or another one, writes into the folder."""
    others = ("parts/test.jsonl", "parts/run/metrics.jsonl", "parts/other/data.json", "parts/notes.txt")
    for name in ("parts/train-1.jsonl", "parts/train-2.jsonl", *others, "more.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "saved")
    names = [str(tmp_path / name) for name in ("parts", "saved", "more.csv")] + ["some/dataset"]
    run = _config(tmp_path, data__train=[{"path": name} for name in names])
    folder = _noted(run)
    for name in others:
        (tmp_path / name).write_text("after!")
    check_unchanged(run, folder)
    for name in ("parts/train-2.jsonl", "more.csv"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("after!")
        with pytest.raises(ValueError, match=rf"{name} has changed"):
            check_unchanged(run, folder)
        (tmp_path / name).write_bytes(before)
    shutil.rmtree(tmp_path / "saved")
    datasets.Dataset.from_dict({"prompt": ["b"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved/data-00000-of-00001\.arrow has changed"):
        check_unchanged(run, folder)


def test_a_file_is_read_again_only_if_its_size_or_times_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_files, "_LARGE", 4)
    pairs = tmp_path / "train.jsonl"
    pairs.write_text("rows")
    run = _config(tmp_path)
    folder = _noted(run)
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: read.append("") or digest(*args))
    check_unchanged(run, folder)
    _noted(run)
    assert not read
    assert f"comparing {pairs} (0 GB)" in capsys.readouterr().out
    os.utime(pairs)
    check_unchanged(run, folder)  # touched, not changed
    assert len(read) == 1


def test_a_launch_reads_a_file_for_its_digest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = write_pairs(tmp_path / "train.jsonl", 2)
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: read.append("") or digest(*args))
    monkeypatch.setattr(sources, "_LARGE", 1)
    sources.open_source(str(pairs), cache_dir=tmp_path)
    found = stamps(_config(tmp_path), {})["data.train"][str(pairs)]["sha256"]
    assert found == hashlib.sha256(pairs.read_bytes()).hexdigest()
    assert len(read) == 1
    write_pairs(pairs, 3)
    assert stamps(_config(tmp_path), {})["data.train"][str(pairs)]["sha256"] != found
    assert len(read) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"train": {}}', '{"files": []}', '{"files": {"data.train": 1}}'])
def test_a_run_that_noted_no_files_is_left_alone(content: str, tmp_path: Path) -> None:
    run = _config(tmp_path)
    folder = _noted(run)
    (tmp_path / "train.jsonl").write_text("rows")
    (folder / "data.json").write_text(content)
    check_unchanged(run, folder)
