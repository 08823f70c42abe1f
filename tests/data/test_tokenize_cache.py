"""Tokenised data on disk: whole or not at all, and never used once it is damaged."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from disks import largest_file, on_small_disk
from toys import toy_tokenizer

from notus.data.tokenize import cached, load_pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {n}", "chosen": f" answer {n}", "rejected": " no"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(pairs: Path, workers: int = 1) -> list[dict[str, list[int]]]:
    rows, _ = load_pairs(
        pairs,
        toy_tokenizer(),
        max_length=64,
        max_prompt_length=32,
        cache_dir=pairs.parent / "cache",
        num_workers=workers,
    )
    return rows.to_list()


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / "rows.arrow").write_bytes(change((folder / "rows.arrow").read_bytes()))


def flipped(data: bytes, place: float) -> bytes:
    at = int(place * len(data))
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "truncated": damage(lambda data: data[: len(data) // 2]),
    "without its end": damage(lambda data: data[:-1]),
    "emptied": damage(lambda data: b""),
    "longer": damage(lambda data: data + b"\0"),
    **{f"a bit flipped at {place}": damage(lambda data, p=place: flipped(data, p)) for place in (0, 0.01, 0.5, 0.8)},
    "rows gone": lambda folder: (folder / "rows.arrow").unlink(),
    "digests gone": lambda folder: (folder / "digests.json").unlink(),
    "digests truncated": lambda folder: (folder / "digests.json").write_text("{"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_told_and_mended(name: str, pairs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = load(pairs)
    (folder,) = (pairs.parent / "cache").iterdir()
    DAMAGES[name](folder)
    assert load(pairs) == whole
    assert f"the tokenised dataset {folder} is damaged: it is made again" in capfd.readouterr().out
    assert load(pairs) == whole
    assert "damaged" not in capfd.readouterr().out


def test_every_file_of_several_is_checked(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("notus.data.tokenize.BATCH_ROWS", 10)
    whole = load(pairs, workers=2)
    (folder,) = (pairs.parent / "cache").iterdir()
    first, second = sorted(folder.glob("*.arrow"))
    second.unlink()
    assert load(pairs, workers=2) == whole
    first.write_bytes(second.read_bytes())
    assert load(pairs) == whole
    assert capfd.readouterr().out.count("is made again") == 2


def test_a_full_disk_leaves_nothing_and_is_told(pairs: Path) -> None:
    cache = pairs.parent / "cache"
    message = rf"{cache}/rows-\w+: cannot be written \(.*\); [\d.]+ GB free in {cache}$"
    with largest_file(2000), pytest.raises(OSError, match=message):
        load(pairs)
    assert list(cache.iterdir()) == []
    assert len(load(pairs)) == 40


def test_an_error_or_a_kill_leaves_no_dataset(tmp_path: Path) -> None:
    def fail(file: str) -> None:
        rows(5, file)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "name", fail)
    assert list(tmp_path.iterdir()) == []


def rows(count: int, file: str) -> None:
    datasets.Dataset.from_dict({"x": range(count)}).map(lambda row: {"y": row["x"]}, cache_file_name=file)


def test_of_two_processes_the_second_takes_what_the_first_made(tmp_path: Path) -> None:
    def second(file: str) -> None:
        cached(tmp_path, "name", lambda other: rows(3, other))  # the first, meanwhile
        rows(3, file)

    assert cached(tmp_path, "name", second)["y"][:] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"{tmp_path}/file/name: cannot be written \((Not a directory|File exists)\)"):
        cached(tmp_path / "file", "name", lambda file: rows(3, file))


def test_a_small_disk_is_told_with_its_free_space(tmp_path: Path) -> None:
    code = (
        "import sys, datasets\nfrom pathlib import Path\nfrom notus.data.tokenize import cached\n"
        "rows = datasets.Dataset.from_dict({'x': range(10**6)})\n"
        "make = lambda file: rows.map(lambda x: {'y': x['x']}, batched=True, cache_file_name=file)\n"
        "try:\n    cached(Path(sys.argv[1]), 'name', make)\n"
        "except OSError as error:\n    print(error, list(Path(sys.argv[1]).iterdir()))"
    )
    ended = on_small_disk(tmp_path, 10**6, code, tmp_path)
    if ended is None:
        pytest.skip("no file system may be mounted here")
    assert ended.returncode == 0, ended.stderr
    assert "No space left on device" in ended.stdout
    assert re.search(rf"; [\d.]+ [MG]B free in {tmp_path} \[\]", ended.stdout)
    assert "; 0.0 GB" not in ended.stdout


def test_leftovers_of_processes_that_are_gone_are_cleared_those_of_others_not(pairs: Path) -> None:
    load(pairs)
    (folder,) = (pairs.parent / "cache").iterdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    names = [
        f".{folder.name}.{host}.{gone.pid}.x",
        f".{folder.name}.{host}.{os.getpid()}.y",
        f".{folder.name}.else.1.z",
    ]
    for name in names:
        (folder.parent / name).mkdir()
    shutil.rmtree(folder)
    load(pairs)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, *names[1:]}
