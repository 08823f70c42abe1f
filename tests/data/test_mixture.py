"""Weights, held-out rows and copies: no evaluation row is trained on, however often its text stands in the data."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from toys import toy_tokenizer

from notus.data.chat import ChatEncoder
from notus.data.mixture import Share, copies, digests_of, hold_out, mixed, rows_to_hold, without
from notus.data.tokenize import Rule, read_shares


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def share(numbers: list[int], weight: float = 1.0) -> Share:
    """Rows whose chosen answer has `number` letters more than the rejected one's."""
    rows = [{"prompt": "Q", "chosen": " " + "X" * number, "rejected": " Y"} for number in numbers]
    rule = Rule(ChatEncoder(toy_tokenizer()), "dpo", 128, 64)
    shares, _ = read_shares(rows, rule)
    return Share("rows", shares[0].rows, weight)


def numbers(rows: datasets.Dataset) -> list[int]:
    return [branches[0].count(branches[0][1]) for branches in rows["branches"]]


def split(shares: list[Share], size: int, seed: int = 42) -> tuple[list[int], list[int], int]:
    left, held, copies_left_out = hold_out(shares, size, seed)
    return numbers(mixed(left, seed)), numbers(held), copies_left_out


def test_without_copies_it_is_the_split_of_datasets() -> None:
    train, held, left_out = split([share(list(range(2, 12)))], 3)
    theirs = datasets.Dataset.from_dict({"n": list(range(2, 12))}).train_test_split(test_size=3, seed=42)
    assert held == sorted(theirs["test"]["n"])
    assert train == sorted(theirs["train"]["n"])
    assert left_out == 0


def test_the_seed_decides() -> None:
    rows = [share(list(range(2, 12)))]
    assert len({tuple(split(rows, 3, seed)[1]) for seed in range(5)}) > 1


@pytest.mark.parametrize("weight", [0.5, 1, 1.5, 3])
def test_no_evaluation_row_is_trained_on_whatever_the_weight(weight: float) -> None:
    train, held, _ = split([share(list(range(2, 39)), weight)], 10)  # 37 rows
    assert len(held) == len(set(held)) == 10
    assert not set(train) & set(held)
    # a half of 37 is 18, of which 10 are held; 1.5 times 27 is 40; three times 27 is 81
    assert len(train) == {0.5: 8, 1: 27, 1.5: 40, 3: 81}[weight]


def test_rows_repeat_after_the_split_as_often_as_the_weight_says() -> None:
    train, _, _ = split([share(list(range(2, 39)), 3)], 10)
    assert set(Counter(train).values()) == {3}


def test_no_copy_of_an_evaluation_row_is_trained_on() -> None:
    once = list(range(2, 12))
    train, held, left_out = split([share(once * 2), share(once, 2)], 4)
    assert len(held) == len(set(held)) == 4
    assert not set(train) & set(held)
    assert left_out == 4 * 2  # two further copies of each
    assert len(train) == 6 * 2 + 6 * 2


def test_an_absurd_weight_is_an_error_and_takes_no_memory() -> None:
    with pytest.raises(ValueError, match=r"rows: weight 1000000000.0 makes 2,000,000,000 rows of 2; lower it"):
        mixed([share([2, 3], 1e9)], 42)


def test_copies_are_counted() -> None:
    assert copies([share([2, 3, 3]), share([3, 4])]) == 2


@pytest.mark.parametrize("size", [0, 3, 4])
def test_both_sides_keep_rows(size: int) -> None:
    with pytest.raises(ValueError, match=f"cannot hold {size} of 3 different rows out .* choose 1 to 2"):
        hold_out([share([2, 3, 4, 4])], size, 42)


@pytest.mark.parametrize(
    ("fraction", "rows", "held"),
    [(0.5, 3, 2), (0.07, 100, 7), (0.1, 30, 3), (0.001, 3, 1), (0.999, 3, 2), (1e-5, 200_000, 2), (0.3, 2, 1)],
)
def test_a_fraction_is_rounded_up_exactly_and_leaves_rows_on_both_sides(fraction: float, rows: int, held: int) -> None:
    assert rows_to_hold(fraction, rows) == held


def test_a_fraction_is_of_the_different_rows_and_holds_the_rows_of_that_number() -> None:
    rows = [2, 3, 4, 4, 5, 6, 7, 7, 8]  # 7 different ones: 0.4 of them are 2.8
    by_fraction, by_number = (hold_out([share(rows)], size, 42) for size in (0.4, 3))
    assert numbers(by_fraction[1]) == numbers(by_number[1])
    assert len(by_fraction[1]) == 3


def test_the_only_row_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="cannot hold out the only row"):
        hold_out([share([2, 2])], 0.5, 42)


def test_overlap_with_named_evaluation_rows_is_left_out() -> None:
    left, count = without([share([2, 3, 4, 3]), share([3])], share([3, 9]).rows)
    assert (numbers(mixed(left, 42)), count) == ([2, 4], 3)
    with pytest.raises(ValueError, match="every training row is an evaluation row"):
        without([share([2, 3])], share([2, 3, 4]).rows)


def test_rows_of_one_text_have_one_digest_wherever_they_stand(tmp_path: Path) -> None:
    found = digests_of(share([2, 3, 2]).rows)
    assert (found[0] == found[2], found[0] == found[1]) == (True, False)
    assert np.array_equal(digests_of(share([5, 2]).rows)[1:], found[:1])
