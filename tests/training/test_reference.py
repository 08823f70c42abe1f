import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from notus.data.dataset import FEATURES
from notus.data.rows import Rows
from notus.training import reference
from notus.training.reference import ReferenceKey, digest_of_rows, reference_logps


def _rows(count: int = 5) -> Rows:
    table = [
        {"trunk": [1, 5], "branches": [[6 + i, 2], [7, 8, 2]], "loss_mask": [[1, 1], [1, 1, 1]]} for i in range(count)
    ]
    return Rows(datasets.Dataset.from_list(table, features=FEATURES))


class _Scorer:
    """Says -(row + branch / 10), and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        self.asked.append(indices.tolist())
        return -torch.tensor([[row, row + 0.1] for row in indices.tolist()])


def _key(rows: Rows) -> ReferenceKey:
    return ReferenceKey("weights", digest_of_rows(rows.digests()), "fp32", "sdpa")


def _call(score: _Scorer, rows: Rows, folder: Path, key: ReferenceKey | None = None) -> tuple[torch.Tensor, bool]:
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


@pytest.mark.parametrize("field", ["weights", "rows", "precision", "kernel"])
def test_every_part_of_the_key_counts(field: str, tmp_path: Path, device: torch.device) -> None:
    rows, score = _rows(), _Scorer()
    _call(score, rows, tmp_path)
    _, read = _call(score, rows, tmp_path, dataclasses.replace(_key(rows), **{field: "other"}))
    assert not read
    assert len(score.asked) == 2


def test_an_interrupted_pass_goes_on_part_by_part(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_SIZE", 2)
    rows = _rows()

    class Killed(Exception):
        pass

    class Failing(_Scorer):
        def __call__(self, indices: np.ndarray) -> torch.Tensor:
            if indices[0] == 4:
                raise Killed
            return super().__call__(indices)

    with pytest.raises(Killed):
        _call(Failing(), rows, tmp_path)
    part = next(tmp_path.glob("*.parts")) / "000000002.safetensors"
    part.write_bytes(part.read_bytes()[:30])  # not whole: computed again
    score = _Scorer()
    logps, _ = _call(score, rows, tmp_path)
    assert score.asked == [[2, 3], [4]]
    torch.testing.assert_close(logps[:, 0], -torch.arange(5.0))


def test_another_run_may_fill_the_same_cache_meanwhile(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_SIZE", 2)
    rows = _rows()

    class Meanwhile(_Scorer):
        def __call__(self, indices: np.ndarray) -> torch.Tensor:
            if indices[0] == 2:
                _call(_Scorer(), rows, tmp_path)  # the other run finishes, and clears the parts away
            return super().__call__(indices)

    logps, _ = _call(Meanwhile(), rows, tmp_path)
    torch.testing.assert_close(logps[:, 0], -torch.arange(5.0))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_part_of_other_rows_is_not_used(tmp_path: Path, device: torch.device) -> None:
    rows = _rows()
    parts = tmp_path / f"{_key(rows).name}.parts"
    parts.mkdir()
    save_file(
        {"logps": torch.zeros(5, 2), "digests": torch.zeros(5, 16, dtype=torch.uint8)},
        parts / "000000000.safetensors",
    )
    score = _Scorer()
    _call(score, rows, tmp_path)
    assert score.asked == [[0, 1, 2, 3, 4]]


def test_log_probs_that_are_not_finite_are_refused(tmp_path: Path, device: torch.device) -> None:
    def score(indices: np.ndarray) -> torch.Tensor:
        return torch.tensor([[0.0, float("nan") if row == 3 else 0.0] for row in indices.tolist()])

    rows = _rows()
    with pytest.raises(ValueError, match=r"not finite for dataset rows \[3\]"):
        reference_logps(score, rows, key=_key(rows), digests=rows.digests(), folder=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def _spoil(path: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**tensors, name: value}, path, metadata)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("digests", torch.zeros(5, 16, dtype=torch.uint8), "other rows"),
        ("token_counts", torch.ones(5, 2, dtype=torch.int64), "other completion tokens"),
        ("logps", torch.full((5, 2), float("inf")), "not finite"),
    ],
)
def test_a_wrong_cache_is_an_error(
    name: str, value: torch.Tensor, message: str, tmp_path: Path, device: torch.device
) -> None:
    rows = _rows()
    _call(_Scorer(), rows, tmp_path)
    _spoil(next(tmp_path.glob("*.safetensors")), name, value)
    with pytest.raises(ValueError, match=message):
        _call(_Scorer(), rows, tmp_path)


def test_a_truncated_cache_is_an_error(tmp_path: Path, device: torch.device) -> None:
    rows = _rows()
    _call(_Scorer(), rows, tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        _call(_Scorer(), rows, tmp_path)


def test_a_cache_under_the_wrong_name_is_an_error(tmp_path: Path, device: torch.device) -> None:
    rows = _rows()
    _call(_Scorer(), rows, tmp_path)
    other = dataclasses.replace(_key(rows), weights="another model")
    next(tmp_path.glob("*.safetensors")).rename(tmp_path / f"{other.name}.safetensors")
    with pytest.raises(ValueError, match="another model, data or precision"):
        _call(_Scorer(), rows, tmp_path, other)
