"""What the benchmark of rounds makes of its measurements."""

from types import ModuleType
from typing import Any

import pytest

ON, OFF = "on-policy, last", "off-policy, own"


@pytest.fixture
def rounds(benchmarks: None) -> ModuleType:
    """The benchmark."""
    import rounds

    assert (rounds.ON, rounds.OFF) == (ON, OFF)
    return rounds


def _run(rate: float, right: str, *shares: float) -> dict[str, Any]:
    made = [{"pairs": 100 + number, "win_rate": share, "judge_calls": 50} for number, share in enumerate(shares)]
    return {"learning_rate": rate, "win_rate": right.count("1") / len(right), "right": right, "rounds": made}


def _seed(seed: int, on: str, off: str) -> dict[str, Any]:
    arms = {ON: [_run(5e-5, on, 0.5, 0.6, 0.7)], OFF: [_run(1e-4, off, 0.5)]}
    return {"seed": seed, "start": {"win_rate": 0.25}, "arms": arms}


SEEDS = [
    _seed(0, "1111100000", "1110000000"),
    _seed(1, "0111100000", "0001100000"),
    _seed(2, "1111000000", "1100000000"),
]


def test_on_policy_beats_only_if_the_whole_interval_is_above_zero(rounds: ModuleType) -> None:
    assert rounds.differences(SEEDS, ON, OFF) == pytest.approx([0.2, 0.2, 0.2])
    assert "rounds beat one" in rounds.verdict(SEEDS)
    # +0.2, +0.2 and -0.3: the mean is above 0, its interval is not
    assert "do not beat" in rounds.verdict([*SEEDS[:2], _seed(2, "0000000000", "1110000000")])
    # the same on every seed, and worse
    assert "do not beat" in rounds.verdict([_seed(number, "1000000000", "1100000000") for number in range(3)])
    assert "no interval" in rounds.verdict(SEEDS[:1])


def test_the_best_learning_rate_of_each_arm_is_that_with_the_most_right_answers(rounds: ModuleType) -> None:
    runs = [_run(5e-5, "1100", 0.5), _run(1e-4, "1110", 0.7), _run(2e-4, "1110", 0.7)]
    tuned = {"seed": 9, "arms": {ON: runs, OFF: runs[:1]}}
    assert rounds.best_rates(tuned) == {ON: [1e-4], OFF: [5e-5]}


def test_the_table_shows_the_arms_side_by_side(rounds: ModuleType) -> None:
    size = {"preferences": 150, "steps": 60, "held_out": 10}
    tuned = {"seed": 9, "arms": {ON: [_run(5e-5, "1100", 0.5)]}}
    results = {"size": size, "samples": 4, "recipe": {"batch_size": 32}, "seeds": SEEDS, "tuned": tuned}
    text = rounds.table(results)
    assert "| on-policy, last | 5e-05 | 150 | 100 + 101 + 102 | 50.0%, 60.0%, 70.0% | 43.3% ± " in text
    assert "| off-policy, own | 0.0001 | 50 | 100 | 50.0% | 23.3% ± " in text
    assert "Right answers of the start: 25.0% on average" in text
    assert text.endswith("Three on-policy rounds beat one off-policy round at the same number of judge calls.")


def test_the_tuning_seed_is_not_compared(rounds: ModuleType) -> None:
    with pytest.raises(ValueError, match="--tune-seed 2 is one of --seeds"):
        rounds.main(["--tune-seed", "2"])
