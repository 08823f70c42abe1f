"""Small runs of `benchmarks/scale.py` and `benchmarks/scale_growth.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_all_phases_run_on_a_few_pairs(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [
        sys.executable, "benchmarks/scale.py", "--pairs=24", "--per-file=12", f"--folder={tmp_path}",
        f"--results={found}",
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(found.read_text())
    assert [result["phase"] for result in results] == ["tokenise", "open", "digest", "plan", "pack"]
    assert all(result["pairs"] == 24 and result["seconds"] > 0 for result in results)
    assert "| 24 | plan |" in done.stdout
    assert "1 steps, " in results[3]["notes"]
    assert {path.name for path in tmp_path.iterdir()} <= {"hub", found.name}  # what it wrote is gone


def test_lengths_are_ultrafeedbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from scale import random_lengths

    lengths = random_lengths(np.random.default_rng(0), 200_000)
    assert lengths.mean(axis=0) == pytest.approx([176, 300, 280], rel=0.01)


def test_a_point_of_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from scale_growth import Point, run_point, table

    point = Point(pairs=2, length=8, vocabulary=50, width=64)
    step = run_point(point, tmp_path)
    # embedding and head 50 x 64; a block: queries and output 64 x 64, keys and values 64 x 32, three of 64 x 192, norms
    assert step.parameters == 2 * 50 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 3 * 64
    # 24 tokens and 16 scored ones a pair; a trunk of 8 sees 36 pairs, a branch 64 + 36; width of attention 64
    forward = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192) * 24 + 2 * 50 * 64 * 16 + 4 * 64 * (36 + 2 * 100)
    assert step.flops == 3 * 2 * forward
    assert step.seconds > 0
    assert "| pairs | 2 | 24 | 50 | 0.1M | 1 |" in table({"pairs": [(point, step)]})
