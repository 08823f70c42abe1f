from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import write_pairs
from toys import toy_model_folder

from notus.runtime.distributed import process_group


@pytest.fixture
def device() -> Iterator[torch.device]:
    """A process group of one rank."""
    with process_group() as found:
        yield found


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of benchmarks, whose modules can be imported."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 18)
