"""Runs' folders in the test's own folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run` by the folder's name."""

    def make(name: str = "run", *args: Any, **files: Any) -> Path:
        return write_run(tmp_path / name, *args, **files)

    return make
