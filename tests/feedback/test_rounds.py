"""What a round came to, read from files written by hand; every number is worked out here from those files."""

import dataclasses
import json

import pytest
from round_folders import completion, rate_summary, record, write_lines, write_object, write_round

from notus.evaluation.intervals import wilson
from notus.feedback import rounds
from notus.feedback.diversity import Diversity
from notus.feedback.rounds import Again, Position, Round, read_round, round_folders, summarise, win_interval


def compared(folder, *pairs, **more):
    """A round with nothing but answers that are compared: the scores of the start's and of this round's."""
    rows = [
        record(f"q{i}", completion("start", f"s{i}", before, **more), completion("now", f"n{i}", after, **more))
        for i, (before, after) in enumerate(pairs)
    ]
    write_lines(folder / "compared.jsonl", rows)
    return summarise(folder).comparison


def test_a_round_is_read_from_its_files(tmp_path):
    found = summarise(write_round(tmp_path / "round-1"))
    assert found.prompts == 2

    assert found.sampling is not None
    assert found.sampling.models == {"round-1": 4, "other": 2}
    policy = found.sampling.policy
    # the policy's own: "a b a b", "a b c", "" and "x", the last of them cut
    assert (policy.count, policy.tokens, policy.empty, policy.cut) == (4, (4 + 3 + 0 + 1) / 4, 1 / 4, 1 / 4)
    # as in the tests of diversity; of the second prompt the two texts have nothing in common
    assert policy.diversity == Diversity((4 / 8, 3 / 5, 1.0, 1.0), (0.5 + 0) / 2, 0.0)
    assert (found.sampling.dropped_duplicates, found.sampling.seconds, found.sampling.tokens_per_second) == (1, 8, 50)

    assert found.rated is not None
    assert (found.rated.scale, found.rated.unrated) == ("rating", 1)
    assert found.rated.mean == pytest.approx((4 + 3 + 1) / 3)
    assert found.rated.mean_of_all == (4 + 3 + 2 + 1 + 5) / 5

    assert found.pairs == rounds.Pairs(3, 0, (4 + 5 + 3.5) / 3, (2 + 1 + 3) / 3, pytest.approx((2 + 4 + 0.5) / 3))
    assert found.training == rounds.Training(3, 0.4, 1.0, 0.5, 0.6, None)  # the last logged value of each

    assert found.start is not None
    assert found.answers is not None
    assert (found.start.tokens, found.answers.tokens) == ((2 + 1 + 1 + 1) / 4, (3 + 1 + 2 + 1) / 4)
    assert found.answers.diversity.distinct[0] == 6 / 7  # one two three, two, five six, same
    assert found.answers.diversity.self_similarity is None  # of one answer a prompt

    evaluation = found.evaluation
    assert evaluation == rounds.Evaluation(1.5, 0.25, 0.15, 4, 0.25, 0.8, (0.49, 0.94), 10, True)
    assert found.kl == 1.5

    comparison = found.comparison
    assert comparison is not None
    # 4 > 2 and 3.5 > 3 win, 4 < 5 loses, and the same text twice ties, whatever it is rated
    assert (comparison.wins, comparison.losses, comparison.ties, comparison.same) == (2, 1, 1, 1)
    assert found.win_rate == comparison.win_rate == 2.5 / 4
    assert (comparison.rating, comparison.start_rating) == ((4 + 3.5 + 4 + 2) / 4, (2 + 3 + 5 + 1) / 4)
    assert (comparison.prompts, comparison.unrated, comparison.scale) == (4, 0, "rating")

    assert found.judging is not None
    assert found.judging.again == Again(1, 0.5, 1.0, 1.0, None)
    assert found.judging.position == Position((3.5, 3.0), (1.5, 0.5))
    assert [part.cost for part in found.judged] == [0.25, 0.5]
    assert (found.judge_requests, found.judge_cost, found.judge_tokens) == (3 + 4, 0.25 + 0.5, 2 * (300 + 60))


def test_a_round_in_progress_has_what_is_there(tmp_path):
    assert summarise(tmp_path / "round-1") == Round()
    folder = write_round(tmp_path / "round-2")
    for name in ("rated.jsonl", "rated.summary.json", "records.summary.json", "compared.jsonl", "evaluation.json"):
        (folder / name).unlink()
    found = summarise(folder)
    assert found.sampling is not None
    assert found.sampling.policy.count == 4  # from the records
    assert (found.sampling.dropped_duplicates, found.sampling.seconds, found.sampling.tokens_per_second) == (None,) * 3
    assert (found.rated, found.judging, found.comparison, found.win_rate, found.kl) == (None,) * 5
    # metrics.jsonl ends with a line that the run is still writing
    with (folder / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss"')
    assert summarise(folder).training == rounds.Training(3, 0.4, 1.0, 0.5, 0.6, None)


def test_a_prompt_without_both_ratings_does_not_count(tmp_path):
    found = compared(tmp_path, (1.0, None), (None, 2.0), (None, None), (1.0, 2.0))
    assert (found.prompts, found.unrated, found.wins, found.win_rate, found.rating) == (1, 3, 1, 1.0, 2.0)
    none = compared(tmp_path, (None, 3.0))
    assert (none.prompts, none.unrated, none.win_rate, none.interval, none.rating) == (0, 1, None, None, None)


def test_a_reward_models_scores_are_compared_on_their_own_scale(tmp_path):
    rows = [
        record("q", completion("start", "a", reward=-3.0), completion("now", "b", reward=-1.0)),
        record("r", completion("start", "a", reward=7.0), completion("now", "b", reward=6.5)),
    ]
    write_lines(tmp_path / "compared.jsonl", rows)
    found = summarise(tmp_path).comparison
    assert found is not None
    assert (found.scale, found.wins, found.losses) == ("reward", 1, 1)
    assert (found.rating, found.start_rating) == ((-1 + 6.5) / 2, (-3 + 7) / 2)


def test_places_tell_the_start_from_the_round_whatever_the_models_are_called(tmp_path):
    write_lines(tmp_path / "compared.jsonl", [record("q", completion("m", "a", 1.0), completion("m", "b", 2.0))])
    found = summarise(tmp_path).comparison
    assert found is not None
    assert (found.wins, found.losses) == (1, 0)


def test_the_interval_without_ties_is_wilsons(tmp_path):
    points = [1.0] * 60 + [0.0] * 40
    # the sample's variance has n - 1: 0.6 · 0.4 · 100 / 99 / 100, so 99 trials
    assert win_interval(points) == wilson(0.6 * 99, 99)


def test_ties_make_the_interval_narrower():
    # 18 wins, 2 losses, 80 ties: 0.58. Its variance is (18 · 0.42² + 2 · 0.58² + 80 · 0.08²) / 99 = 0.04404
    # so as sure as 0.58 · 0.42 / (0.04404 / 100) = 553 trials
    points = [1.0] * 18 + [0.0] * 2 + [0.5] * 80
    assert win_interval(points) == wilson(0.58 * 553, 553)
    low, high = win_interval(points)
    assert 0.5 < low < 0.58 < high < wilson(58, 100)[1]


@pytest.mark.parametrize("points", [[1.0] * 3, [0.0] * 5, [0.5] * 10, [1.0], [0.5]])
def test_the_interval_of_equal_points_is_wilsons_of_the_prompts(points):
    assert win_interval(points) == wilson(sum(points), len(points))


def test_lists_and_the_other_schema_of_pairs_have_margins_too(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen-rating": 5.0, "rejected-rating": 2.0}])
    assert summarise(tmp_path).pairs == rounds.Pairs(1, 0, 5.0, 2.0, 3.0)
    write_lines(tmp_path / "pairs.jsonl", [{"ratings": [2.0, 4.5, 1.0]}, {"ratings": [3.0, 3.0]}])
    assert summarise(tmp_path).pairs == rounds.Pairs(2, 0, (4.5 + 3) / 2, (1 + 3) / 2, 3.5 / 2)
    write_lines(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert summarise(tmp_path).pairs == rounds.Pairs(1, 0, None, None, None)


def test_pairs_of_earlier_rounds_are_counted(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [{"chosen-rating": 5, "rejected-rating": worst} for worst in (1, 2, 3)])
    write_lines(tmp_path / "own-pairs.jsonl", [{"chosen-rating": 5, "rejected-rating": 1}])
    assert summarise(tmp_path).pairs == rounds.Pairs(3, 2, 5.0, 2.0, 3.0)


def test_an_evaluation_on_the_rounds_own_pairs_is_not_held_out(tmp_path):
    folder = write_round(tmp_path / "round-1")
    tree = json.loads((folder / "evaluation.json").read_text())
    for pairs, held_out in ((folder / "pairs.jsonl", False), (tmp_path / "pairs.jsonl", True)):
        write_object(folder / "evaluation.json", {**tree, "pairs": str(pairs), "kl": None})
        found = summarise(folder).evaluation
        assert found is not None
        assert (found.held_out, found.kl, found.accuracy) == (held_out, None, 0.8)


def test_the_judges_sums_are_not_known_where_a_part_is_not(tmp_path):
    folder = write_round(tmp_path / "round-1")
    write_object(folder / "rated.summary.json", rate_summary(cost=None, prompt_tokens=None))
    found = summarise(folder)
    assert (found.judge_requests, found.judge_cost, found.judge_tokens) == (3 + 4, None, None)
    assert (Round().judge_requests, Round().judge_cost, Round().judge_tokens) == (None, None, None)


def test_an_endpoint_that_does_not_say_how_long_its_texts_are_leaves_their_length_open(tmp_path):
    unknown = {**completion("m", "b"), "tokens": None}
    write_lines(tmp_path / "records.jsonl", [record("p", completion("m", "a"), unknown)])
    found = summarise(tmp_path).sampling
    assert found is not None
    assert found.policy.tokens is None


def test_a_metric_that_is_not_finite_is_not_known(tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n')
    found = summarise(tmp_path)
    assert found.training == rounds.Training(2, None, None, None, None, None)
    rounds.write_round(tmp_path, found)  # JSON has no NaN


def test_round_json_holds_the_round(tmp_path):
    folder = write_round(tmp_path / "round-1")
    found = summarise(folder)
    rounds.write_round(folder, found)
    assert json.loads((folder / "round.json").read_text())["comparison"]["win_rate"] == 0.625
    assert read_round(folder) == found
    (folder / "compared.jsonl").unlink()
    assert read_round(folder) == found  # a finished round is read from it alone
    (folder / "round.json").unlink()
    assert read_round(folder) == dataclasses.replace(found, comparison=None)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("compared.jsonl", '{"completions": [', "line 1"),
        ("compared.jsonl", '{"completions": "none"}\n', "line 1: completions"),
        ("answers.jsonl", json.dumps(record("q", completion("m", "a"))) + "\n", "line 1: 1 completions"),
        ("rated.jsonl", '["a list"]\n', "line 1"),
        ("rated.jsonl", json.dumps({"completions": [{"model": "m", "response": "r", "reward": "9"}]}) + "\n", "'9'"),
        ("pairs.jsonl", '{"chosen-rating": "5", "rejected-rating": 1}\n', "line 1: a rating"),
        ("rated.summary.json", "{}", "judge"),
        ("compared.summary.json", json.dumps(rate_summary(cost="free")), "cost"),
        ("evaluation.json", '{"overall": []', "evaluation.json"),
        ("round.json", "[]", "round.json"),
        ("run/metrics.jsonl", '{"loss": 1.0}\n', "line 1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, named):
    folder = write_round(tmp_path / "round-1")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=named) as raised:
        read_round(folder)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rounds_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("round-10", "round-2", "round-1", "round-two", "start"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in round_folders(tmp_path)] == ["round-1", "round-2", "round-10"]


def test_summaries_may_hold_more_than_is_read(tmp_path):
    write_object(tmp_path / "rated.summary.json", rate_summary(again=None, position=None, prompt_tokens=None, more=1))
    found = summarise(tmp_path).judging
    assert found is not None
    assert (found.again, found.position, found.prompt_tokens) == (None, None, None)
