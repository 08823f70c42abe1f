import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from notus.runtime.distributed import gather_objects, main_first, on_main, sum_across_ranks


def _worker(folder: Path) -> None:
    rank = dist.get_rank()
    assert on_main(lambda: os.getpid()) == gather_objects(os.getpid())[0]
    with pytest.raises(ValueError, match="said rank 0"):
        on_main(lambda: _fail("said rank 0"))
    with pytest.raises(OSError, match="no space"):
        on_main(lambda: _no_space())
    path = folder / "cache"

    def work() -> bool:
        existed = path.exists()
        path.touch()
        return existed

    assert main_first(work) is (rank != 0)
    assert sum_across_ranks(torch.tensor([1.0, float(rank)])).tolist() == [2.0, 1.0]


def _fail(message: str) -> None:
    raise ValueError(message)


def _no_space() -> None:
    raise OSError(28, "no space left")


def test_rank_0_works_for_all_and_its_failure_is_everyones(tmp_path: Path) -> None:
    run_ranks(_worker, 2, tmp_path, tmp_path)
