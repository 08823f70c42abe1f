import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks

from notus.training import run_folder as shared
from notus.training.run_folder import check_shared


def _worker(top: Path) -> None:
    rank = dist.get_rank()
    for name in ("0", "1"):
        (top / name).mkdir(exist_ok=True)
    dist.barrier()
    check_shared(top / "0")
    shared.PATIENCE = 0.5
    message = rf"rank 1 on \S+, whose folder is {re.escape(str(top / '1'))}, does not see .*: training\.output_dir must"
    with pytest.raises(ValueError, match=message):
        check_shared(top / str(rank))
    with pytest.raises(OSError, match="No such file"):
        check_shared(top / "none")
    dist.barrier()
    assert not os.listdir(top / "0")


def test_every_rank_must_see_the_same_folder(tmp_path: Path) -> None:
    run_ranks(_worker, 2, tmp_path, tmp_path)
