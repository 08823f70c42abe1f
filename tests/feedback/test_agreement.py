"""Agreement and position bias, worked out by hand."""

import pytest

from notus.feedback.agreement import Again, Position, agreement, positions


def test_agreement_by_hand() -> None:
    twice = [
        # the best one moves from the first to the second; differences 2 and 0
        ([4.0, 3.0], [2.0, 3.0]),
        # the same best one; differences 0, 1 and one without a second rating
        ([5.0, 1.0, 3.0], [5.0, 2.0, None]),
    ]
    found = agreement(twice)
    assert found is not None
    assert (found.prompts, found.exact, found.within_one, found.same_best) == (2, 2 / 4, 3 / 4, 1 / 2)
    # pairs (4,2) (3,3) (5,5) (1,2): means 13/4 and 12/4; covariance sum 5, variance sums 35/4 and 6
    assert found.correlation == pytest.approx(5 / (35 / 4 * 6) ** 0.5)


def test_agreement_where_little_is_rated() -> None:
    assert agreement([]) is None
    assert agreement([([None, None], [3.0, 4.0])]) is None
    assert agreement([([3.0, None], [3.0, 4.0])]) == Again(1, 1.0, 1.0, None, None)
    # of several best ones the first counts, as in `notus curate`
    found = agreement([([4.0, 4.0, 1.0], [4.0, 3.0, 1.0])])
    assert found is not None
    assert found.same_best == 1.0


def test_means_that_differ_by_rounding_alone_are_the_same() -> None:
    found = agreement([([(1 + 2 + 2) / 3, 3.0], [1 + 2 / 3, 3.0])])
    assert found is not None
    assert found.exact == 1.0


def test_positions_by_hand() -> None:
    seen = [
        [5.0, 3.0, 1.0],  # the first place wins; by chance each place has 1/3
        [2.0, 4.0, 4.0],  # the second and the third share it; 1/3 each
        [None, 3.0, 2.0],  # the second wins; 1/2 each of the two
        [4.0],  # nothing to compare
        [None, None],
        [3.0, 2.0],  # the first; 1/2 each
    ]
    found = positions(seen)
    assert found is not None
    assert found.mean_rating == pytest.approx([10 / 3, 12 / 4, 7 / 3])
    by_chance = [1 / 3 + 1 / 3 + 1 / 2, 1 / 3 + 1 / 3 + 1 / 2 + 1 / 2, 1 / 3 + 1 / 3 + 1 / 2]
    assert found.best == pytest.approx([2 / by_chance[0], 1.5 / by_chance[1], 0.5 / by_chance[2]])


def test_places_that_few_prompts_have_are_no_bias() -> None:
    """Equal texts are shown once, so only some prompts have a third completion. Each place wins its fair share."""
    pairs = [[4.0, 2.0], [2.0, 4.0]] * 6
    triples = [[4.0, 2.0, 2.0], [2.0, 4.0, 2.0], [2.0, 2.0, 4.0]]
    found = positions([*pairs, *triples])
    assert found is not None
    assert found.best == pytest.approx([1.0, 1.0, 1.0])


def test_a_place_without_any_rating_is_none() -> None:
    assert positions([[4.0, None, 2.0]]) == Position([4.0, None, 2.0], [2.0, None, 0.0])


def test_no_positions_without_a_comparison() -> None:
    assert positions([[4.0], [None, 3.0]]) is None
