import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from disks import largest_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from notus.data.dataset import FEATURES, TokenizedDataset
from notus.training import reference
from notus.training.reference import ReferenceKey, digest_of_rows, reference_logps, stored_logps


def _rows(count: int = 5) -> TokenizedDataset:
    table = [
        {"trunk": [1, 5], "branches": [[6 + i, 2], [7, 8, 2]], "loss_mask": [[1, 1], [1, 1, 1]]} for i in range(count)
    ]
    return TokenizedDataset(datasets.Dataset.from_list(table, features=FEATURES))


class _Scorer:
    """Says -(row + branch / 10), and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        self.asked.append(indices.tolist())
        return -torch.tensor([[row, row + 0.1] for row in indices.tolist()])


def _key(rows: TokenizedDataset) -> ReferenceKey:
    return ReferenceKey("weights", digest_of_rows(rows.digests()), "fp32", "sdpa")


def _call(
    score: _Scorer, rows: TokenizedDataset, folder: Path, key: ReferenceKey | None = None
) -> tuple[torch.Tensor, bool]:
    return reference_logps(score, rows, key=key or _key(rows), digests=rows.digests(), folder=folder)


def test_computed_once_then_read(tmp_path: Path, device: torch.device) -> None:
    rows, score = _rows(), _Scorer()
    first, read = _call(score, rows, tmp_path)
    assert not read
    torch.testing.assert_close(first, -torch.tensor([[i, i + 0.1] for i in range(5)]))
    second, read = _call(score, rows, tmp_path)
    assert read
    assert torch.equal(first, second)
    assert score.asked == [[0, 1, 2, 3, 4]]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_rows_are_looked_up_by_their_content(tmp_path: Path, device: torch.device) -> None:
    rows = _rows()
    _call(_Scorer(), rows, tmp_path)
    (path,) = tmp_path.iterdir()
    digests = rows.digests()
    found = stored_logps([tmp_path / "none.safetensors", path], digests[[3, 0, 3]], 2)
    assert found is not None
    torch.testing.assert_close(found, -torch.tensor([[3, 3.1], [0, 0.1], [3, 3.1]]))
    unknown = np.concatenate([digests[:2], digests[:1] ^ 1])
    assert stored_logps([path], unknown, 2) is None
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="damaged"):
        stored_logps([path], digests, 2)


def test_rows_are_found_in_caches_of_longer_and_of_shorter_lists(tmp_path: Path, device: torch.device) -> None:
    """The log-probs of a completion that a row lacks are 0 in a cache."""
    rows, paths = _rows(), []
    for number, table in enumerate([[[-1.0, -2.0, 0.0, 0.0]] * 2, [[-3.0, -4.0], [-5.0, -6.0]]]):
        digests = rows.digests()[2 * number : 2 * number + 2]
        paths.append(tmp_path / f"{number}.safetensors")
        reference._write(paths[-1], {"logps": torch.tensor(table), "digests": torch.from_numpy(digests)}, {})
    found = stored_logps(paths, rows.digests()[:4], 3)
    assert found is not None
    assert found.tolist() == [[-1, -2, 0], [-1, -2, 0], [-3, -4, 0], [-5, -6, 0]]


@pytest.mark.parametrize("field", ["weights", "rows", "precision", "kernel"])
def test_every_part_of_the_key_counts(field: str, tmp_path: Path, device: torch.device) -> None:
    rows, score = _rows(), _Scorer()
    _call(score, rows, tmp_path)
    _, read = _call(score, rows, tmp_path, dataclasses.replace(_key(rows), **{field: "other"}))
    assert not read
    assert len(score.asked) == 2


def test_another_run_may_fill_the_same_cache_meanwhile(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_SIZE", 2)
    rows = _rows()

    class Other(_Scorer):
        def __call__(self, indices: np.ndarray) -> torch.Tensor:
            return super().__call__(indices) * (1 + 1e-6)  # on another GPU, say

    class Meanwhile(_Scorer):
        def __call__(self, indices: np.ndarray) -> torch.Tensor:
            if indices[0] == 4:
                shutil.rmtree(tmp_path / f"{_key(rows).name}.parts")
                _call(Other(), rows, tmp_path)  # the other run finishes, and clears the parts away
            return super().__call__(indices)

    logps, _ = _call(Meanwhile(), rows, tmp_path)
    torch.testing.assert_close(logps[:, 0], -torch.arange(5.0))
    again, read = _call(_Scorer(), rows, tmp_path)
    assert read
    assert torch.equal(again, logps)  # a resumed run learns from the same
    assert not torch.equal(again, _Scorer()(np.arange(5)))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_part_of_other_rows_is_not_used(tmp_path: Path, device: torch.device) -> None:
    rows = _rows()
    parts = tmp_path / f"{_key(rows).name}.parts"
    parts.mkdir()
    save_file(
        {"logps": torch.zeros(5, 2), "digests": torch.zeros(5, 16, dtype=torch.uint8)}, parts / "000000000.safetensors"
    )
    score = _Scorer()
    _call(score, rows, tmp_path)
    assert score.asked == [[0, 1, 2, 3, 4]]


def test_log_probs_that_are_not_finite_are_refused(tmp_path: Path, device: torch.device) -> None:
    def score(indices: np.ndarray) -> torch.Tensor:
        return torch.tensor([[0.0, float("nan") if row == 3 else 0.0] for row in indices.tolist()])

    rows = _rows()
    for precision, advice in (("fp32", "check its weights$"), ("bf16", "or use training.precision=fp32$")):
        key = dataclasses.replace(_key(rows), precision=precision)
        with pytest.raises(ValueError, match=rf"not finite for rows \(row 4\).*{advice}"):
            reference_logps(score, rows, key=key, digests=rows.digests(), folder=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def _replace(path: Path, name: str, value: torch.Tensor) -> None:
    """Write the cache anew, whole, with another tensor in it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    reference._write(path, {**load_file(path), name: value}, metadata)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("digests", torch.zeros(5, 16, dtype=torch.uint8), "other rows"),
        ("token_counts", torch.ones(5, 2, dtype=torch.int64), "other completion tokens"),
    ],
)
def test_a_wrong_cache_is_an_error(
    name: str, value: torch.Tensor, message: str, tmp_path: Path, device: torch.device
) -> None:
    rows = _rows()
    _call(_Scorer(), rows, tmp_path)
    _replace(next(tmp_path.glob("*.safetensors")), name, value)
    with pytest.raises(ValueError, match=message):
        _call(_Scorer(), rows, tmp_path)


def test_a_damaged_cache_is_an_error(tmp_path: Path, device: torch.device) -> None:
    rows = _rows()
    logps, _ = _call(_Scorer(), rows, tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{path} is damaged .*: delete {path} to compute it again"):
            _call(_Scorer(), rows, tmp_path)
    told = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            again, _ = _call(_Scorer(), rows, tmp_path)
            assert torch.equal(again, logps)  # a flip that changes nothing, as in the number of the format
        except ValueError as error:
            told.append(str(error))
    assert all(str(path) in message for message in told)
    assert len(told) > len(whole) - 60


def test_a_damaged_part_is_computed_again(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "PART_SIZE", 2)
    rows = _rows()
    monkeypatch.setattr(reference, "_write_cache", _no_space)
    with pytest.raises(OSError, match="no space"):
        _call(_Scorer(), rows, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(reference, "PART_SIZE", 2)
    first, second, third = sorted(next(tmp_path.glob("*.parts")).iterdir())
    value = load_file(second)["logps"].numpy().tobytes()
    whole = second.read_bytes()
    second.write_bytes(whole.replace(value, bytes([value[0] ^ 1]) + value[1:]))
    third.write_bytes(third.read_bytes()[:-1])
    score = _Scorer()
    logps, _ = _call(score, rows, tmp_path)
    assert score.asked == [[2, 3], [4]]
    torch.testing.assert_close(logps, -torch.tensor([[i, i + 0.1] for i in range(5)]))
    told = capsys.readouterr().out
    assert f"{second} is damaged" in told
    assert f"{third} is damaged" in told
    assert str(first) not in told


def _no_space(*_: object) -> None:
    raise OSError("no space")


def test_a_full_disk_leaves_the_parts_and_is_told(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_SIZE", 20)
    rows, score = _rows(100), _Scorer()
    message = rf"{tmp_path}/{_key(rows).name}\.safetensors: cannot be written \(.*\); [\d.]+ GB free in {tmp_path}$"
    with largest_file(2000), pytest.raises(OSError, match=message):  # enough for a part, not for the whole
        _call(score, rows, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{_key(rows).name}.parts"]
    assert len(score.asked) == 5
    logps, _ = _call(score, rows, tmp_path)
    assert len(score.asked) == 5  # the parts were whole
    torch.testing.assert_close(logps[:, 0], -torch.arange(100.0))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_cache_under_the_wrong_name_is_an_error(tmp_path: Path, device: torch.device) -> None:
    rows = _rows()
    _call(_Scorer(), rows, tmp_path)
    other = dataclasses.replace(_key(rows), weights="another model")
    next(tmp_path.glob("*.safetensors")).rename(tmp_path / f"{other.name}.safetensors")
    with pytest.raises(ValueError, match="another model, data or precision"):
        _call(_Scorer(), rows, tmp_path, other)


def test_a_run_that_is_done_with_the_same_cache_may_remove_its_parts_any_time(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = reference.write_tensors, [2]

    def disturbed(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        if left[0]:
            left[0] -= 1
            path.unlink() if left[0] else shutil.rmtree(path.parent)  # it may be at either, at that moment

    monkeypatch.setattr(reference, "write_tensors", disturbed)
    rows, scorer = _rows(), _Scorer()
    logps, read = _call(scorer, rows, tmp_path)
    assert not read
    assert left == [0]
    assert torch.equal(_call(scorer, rows, tmp_path)[0], logps)


def test_a_cache_without_public_sums_has_the_name_it_always_had() -> None:
    key = ReferenceKey("weights", "rows", "fp32", "sdpa")
    described = '{"format": 4, "kernel": "sdpa", "precision": "fp32", "rows": "rows", "weights": "weights"}'
    assert key.name == hashlib.sha256(described.encode()).hexdigest()[:32] == "2f8bcb7d47f08f3835559ac284d113d3"
    assert key.described() == {"weights": "weights", "rows": "rows", "precision": "fp32", "kernel": "sdpa"}
    assert dataclasses.replace(key, public=True).name != key.name


def test_a_cache_with_public_sums(tmp_path: Path, device: torch.device) -> None:
    rows = _rows()
    key = dataclasses.replace(_key(rows), public=True)
    table = torch.arange(20.0).view(5, 4)

    def score(indices: np.ndarray) -> torch.Tensor:
        return table[torch.from_numpy(indices)]

    for was_read in (False, True):
        found, read = reference_logps(score, rows, key=key, digests=rows.digests(), folder=tmp_path)
        assert torch.equal(found, table)
        assert read == was_read
    (path,) = tmp_path.iterdir()
    stored = load_file(path)
    assert torch.equal(stored["logps"], table[:, :2])
    assert torch.equal(stored["public_logps"], table[:, 2:])
    assert torch.equal(stored_logps([path], rows.digests(), 2), table[:, :2])
