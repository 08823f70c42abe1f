"""Small runs of `benchmarks/scale.py` and `benchmarks/scale_growth.py`."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_all_phases_run_on_a_few_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scale

    monkeypatch.setattr(scale, "run_phase", scale.measure)  # here, not in a process of its own
    results = scale.run_all(tmp_path, pairs=24, per_file=12, seed=0)
    assert [result.phase for result in results] == ["tokenise", "open", "digest", "plan", "pack"]
    assert all(result.pairs == 24 and result.seconds > 0 for result in results)
    assert results[0].notes == "0 MB on disk"
    assert results[3].notes.startswith("1 steps, ")
    assert results[4].notes.startswith("1 rows of one rank, ")
    assert len(scale.table(results).splitlines()) == 7


def test_lengths_are_ultrafeedbacks() -> None:
    from scale import random_lengths

    lengths = random_lengths(np.random.default_rng(0), 200_000)
    assert lengths.mean(axis=0) == pytest.approx([176, 300, 280], rel=0.01)


def test_a_point_of_growth() -> None:
    from scale_growth import Point, measure, table

    point = Point(pairs=2, length=8, vocabulary=50, width=64)
    step = measure(point)
    # embedding and head 50 x 64; a block: queries and output 64 x 64, keys and values 64 x 32, three of 64 x 192, norms
    assert step.parameters == 2 * 50 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 3 * 64
    # 24 tokens and 16 scored ones a pair; a trunk of 8 sees 36 pairs, a branch 64 + 36; width of attention 64
    forward = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192) * 24 + 2 * 50 * 64 * 16 + 4 * 64 * (36 + 2 * 100)
    assert step.flops == 3 * 2 * forward
    assert step.seconds > 0
    assert "| pairs | 2 | 24 | 50 | 0.1M | 1 |" in table({"pairs": [(point, step)]})
