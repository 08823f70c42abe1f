"""The rule that turns rated completions into preference pairs."""

import hashlib
import random
from fractions import Fraction

import pytest

from notus.curation.decontamination import CONTAINED, EQUAL
from notus.curation.ultrafeedback import IDENTICAL, SOURCE, TIED, TOO_FEW, Curator, curate, mean_rating

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def annotations(*ratings):
    return {
        aspect: {"Rating": rating, "Rationale": "because"} for aspect, rating in zip(ASPECTS, ratings, strict=False)
    }


def completion(ratings, overall_score=5.0, response=None, model="m"):
    text = f"response {ratings} {overall_score}" if response is None else response
    return {"model": model, "response": text, "annotations": annotations(*ratings), "overall_score": overall_score}


def record(*completions, instruction="What?", source="flan"):
    return {"source": source, "instruction": instruction, "completions": list(completions)}


def single(raw, **options):
    pairs, report = curate([raw], **options)
    return (pairs[0] if pairs else None), report


@pytest.mark.parametrize(
    ("ratings", "mean"),
    [
        (("2", "3", "3", "3"), Fraction(11, 4)),
        (("5", "N/A", "4", "4"), Fraction(13, 3)),
        (("N/A", "1", None, "N/A"), Fraction(1)),
        (("N/A", "N/A", "N/A", "N/A"), None),
        ((4, 5.0), Fraction(9, 2)),
    ],
)
def test_mean_is_over_the_rated_aspects(ratings, mean):
    assert mean_rating(annotations(*ratings)) == mean


def test_chosen_is_first_of_the_highest_and_rejected_is_strictly_lower():
    raw = record(
        completion(("4", "4"), response="low", model="a"),
        completion(("5", "4"), response="first", model="b"),
        completion(("4", "5"), response="second", model="c"),
        completion(("N/A", "N/A"), response="unrated", model="d"),
    )
    for seed in range(20):
        pair, _ = single(raw, seed=seed)
        assert pair == {
            "source": "flan",
            "instruction": "What?",
            "chosen_response": "first",
            "rejected_response": "low",
            "chosen_avg_rating": 4.5,
            "rejected_avg_rating": 4.0,
            "chosen_model": "b",
        }


def test_cleaned_schema_holds_the_same_pair_as_messages():
    raw = record(
        completion(("2", "3", "3", "3"), response="no", model="a"), completion(("5",), response="yes", model="b")
    )
    pair, _ = single(raw, schema="cleaned")
    assert pair == {
        "source": "flan",
        "prompt": "What?",
        "chosen": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "yes"}],
        "chosen-rating": 5.0,
        "chosen-model": "b",
        "rejected": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "no"}],
        "rejected-rating": 2.75,
        "rejected-model": "a",
    }


def test_rounding_breaks_no_tie():
    assert (4.1 + 4.3) / 2 != 4.2  # as floats the two means would differ
    pair, report = single(record(completion(("4.1", "4.3")), completion((4.2,))))
    assert pair is None
    assert report.dropped[TIED] == 1


def test_rejected_is_drawn_evenly_from_all_that_are_lower():
    raws = [
        record(*(completion((rating,), response=rating) for rating in "5123"), instruction=f"question {n}")
        for n in range(600)
    ]
    pairs, _ = curate(raws)
    drawn = [sum(pair["rejected_response"] == rating for pair in pairs) for rating in "123"]
    assert sum(drawn) == 600
    assert all(150 < count < 250 for count in drawn)  # 200 expected, standard deviation 11.5


def test_draw_depends_on_seed_and_text_alone():
    raws = [
        record(*(completion((rating,), response=rating) for rating in "5123"), instruction=f"question {n}")
        for n in range(50)
    ]
    pairs, _ = curate(raws)
    order = random.Random(1).sample(range(50), 50)
    assert curate([raws[i] for i in order])[0] == [pairs[i] for i in order]
    assert curate(raws[20:30])[0] == pairs[20:30]
    assert curate(raws, seed=43)[0] != pairs


def test_draw_is_the_documented_hash():
    raw = record(*(completion((rating,), response=rating, model="m") for rating in "5123"), source="s", instruction="i")
    data = b"".join(
        len(text).to_bytes(8, "big") + text
        for text in (b"42", b"s", b"i", b"m", b"5", b"m", b"1", b"m", b"2", b"m", b"3")
    )
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    assert single(raw)[0]["rejected_response"] == "123"[number % 3]


def test_a_repeated_prompt_is_kept_and_counted_and_draws_by_its_own_completions():
    raws = [record(*(completion((rating,), response=f"{rating} of {n}") for rating in "5123")) for n in range(40)]
    pairs, report = curate(raws)
    assert len(pairs) == 40
    assert report.repeated_prompts == 39
    assert len({pair["rejected_response"][0] for pair in pairs}) == 3


def test_zephyrs_rule_draws_from_all_others_ties_included():
    raws = [
        record(*(completion((), score, f"{i}") for i, score in enumerate((8, 9, 9, 5))), instruction=f"question {n}")
        for n in range(300)
    ]
    pairs, report = curate(raws, by="overall_score", rejected="any")
    assert {pair["chosen_response"] for pair in pairs} == {"1"}  # the first of the two with 9
    drawn = [sum(pair["rejected_response"] == i for pair in pairs) for i in "023"]
    assert sum(drawn) == 300
    assert all(75 < count < 125 for count in drawn)  # 100 expected, standard deviation 8.2
    tied = next(pair for pair in pairs if pair["rejected_response"] == "2")
    assert (tied["chosen_avg_rating"], tied["rejected_avg_rating"]) == (9, 9)
    assert "300 records -> 300 pairs by overall_score, any other rejected" in str(report)
    lower, _ = curate(raws, by="overall_score")
    assert {pair["rejected_response"] for pair in lower} == {"0", "3"}


def test_zephyrs_rule_drops_no_tied_prompt_and_draws_by_the_same_hash():
    raw = record(*(completion((), 7, i, model="m") for i in "abcd"), source="s", instruction="i")
    assert single(raw, by="overall_score")[1].dropped == {TIED: 1}
    pair, report = single(raw, by="overall_score", rejected="any", seed=7)
    texts = (b"7", b"s", b"i", b"m", b"a", b"m", b"b", b"m", b"c", b"m", b"d")
    data = b"".join(len(text).to_bytes(8, "big") + text for text in texts)
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    assert (pair["chosen_response"], pair["rejected_response"]) == ("a", "bcd"[number % 3])
    assert report.dropped == {}


def test_a_completion_without_a_score_is_counted_and_never_drawn():
    raw = record(completion((), 7, "a"), completion((), None, "b"), completion((), 7, "c"), completion((), "N/A", "d"))
    for seed in range(20):
        pair, report = single(raw, by="overall_score", rejected="any", seed=seed)
        assert (pair["chosen_response"], pair["rejected_response"]) == ("a", "c")
    assert report.unscored == 2
    assert "completions without a score, neither chosen nor rejected: 2" in str(report)


def test_responses_of_one_text_are_no_pair():
    raws = [
        record(completion(("5",), response="4"), completion(("1",), response=" 4\n"), instruction="2 + 2?"),
        record(completion(("5",), response="4"), completion(("1",), response="5"), instruction="2 + 2?"),
    ]
    pairs, report = curate(raws)
    assert [pair["rejected_response"] for pair in pairs] == ["5"]
    assert report.dropped == {IDENTICAL: 1}
    assert report.repeated_prompts == 0  # the first of the two is no pair
    assert "dropped, chosen and rejected responses are the same text: 1" in str(report)
    kept, report = curate(raws, keep_identical=True)
    assert [pair["rejected_response"] for pair in kept] == [" 4\n", "5"]
    assert report.dropped == {}
    assert "kept, though both responses are the same text (training drops these): 1" in str(report)


def test_dropping_identical_responses_changes_no_other_draw():
    answers = ("4", "4", "5", "6")  # the second is what a third of the draws take
    raws = [
        record(*(completion((rating,), response=answers[i]) for i, rating in enumerate("5123")), instruction=f"{n}")
        for n in range(60)
    ]
    (pairs, report), (kept, _) = curate(raws), curate(raws, keep_identical=True)
    assert pairs == [pair for pair in kept if pair["rejected_response"] != "4"]
    assert report.dropped[IDENTICAL] == 60 - len(pairs) > 0


def test_pairs_with_an_empty_response_are_kept_and_counted():
    raws = [
        record(completion(("5",), response="a"), completion(("1",), response=" ")),
        record(completion(("5",), response=""), completion(("1",), response="b")),
        record(completion(("5",), response=""), completion(("1",), response="\n")),
    ]
    pairs, report = curate(raws)
    assert len(pairs) == report.empty == 2
    assert report.dropped == {IDENTICAL: 1}


def test_every_dropped_record_has_one_counted_reason():
    low, high, unrated = completion(("1",), 1), completion(("5",), 9), completion(("N/A",), None)
    raws = [
        record(low, high),
        record(low, unrated),
        record(),
        record(low, low, unrated),
        record(low, high, source="truthful_qa"),
        record(low, high, instruction="Is it safe?"),
        record(low, high, instruction="Tell me. Is it safe?"),
    ]
    pairs, report = curate(raws, decontaminate=["is IT safe"], drop_sources=["truthful_qa"])
    assert len(pairs) == 1
    assert report.dropped == {TOO_FEW: 2, TIED: 1, SOURCE: 1, EQUAL: 1, CONTAINED: 1}
    assert report.records == {"flan": 6, "truthful_qa": 1}
    assert report.pairs == {"flan": 1}
    assert report.compared == 1
    text = str(report)
    assert "7 records -> 1 pairs by ratings, a strictly lower one rejected" in text
    assert "fewer than two scored completions: 2" in text
    assert "the prompt contains a listed question: 1\n    'is IT safe' in 'Tell me. Is it safe?'\n" in text
    assert "from flan: 1 of 6" in text
    assert "note:" not in text
    assert "note: training on pairs from truthful_qa" in str(curate(raws)[1])


def test_a_report_shows_three_prompts_that_contain_a_question_and_twenty_sources():
    raws = [
        record(completion(("1",)), completion(("5",)), instruction=f"{n}: is it safe?", source=f"{n}")
        for n in range(23)
    ]
    _, report = curate(raws, decontaminate=["Is it safe?"])
    assert report.examples == [(f"{n}: is it safe?", "Is it safe?") for n in range(3)]
    assert str(report).endswith("\n  and from 3 more sources")


def test_rules_compare_by_text_where_both_give_a_pair():
    raws = [
        record(completion(("5",), 9, "a"), completion(("1",), 1, "b")),  # agree
        record(completion(("5",), 1, "a"), completion(("1",), 9, "b")),  # differ
        record(completion(("5",), 1, "a"), completion(("4",), 9, "a"), completion(("1",), 1, "b")),  # one text
        record(completion(("5",), 9, "a"), completion(("1",), 9, "b")),  # scores tie
        record(completion(("5",), None, "a"), completion(("1",), None, "b")),  # no scores
        record(completion(("3",), 1, "a"), completion(("3",), 9, "b")),  # ratings tie
    ]
    _, report = curate(raws)
    assert (report.compared, report.differing) == (3, 1)
    assert report.differing_share == pytest.approx(1 / 3)
    assert "1 of the 3 prompts where both give a pair (33.3%)" in str(report)
    assert curate([])[1].differing_share == 0


def test_min_rating_zero_averages_zeros_in():
    raw = record(completion(("0", "2", "2")), completion(("2",)))
    with pytest.raises(ValueError, match="--min-rating 0"):
        curate([raw])
    pair, _ = single(raw, min_rating=0)
    assert (pair["chosen_avg_rating"], pair["rejected_avg_rating"]) == (2.0, 4 / 3)


@pytest.mark.parametrize("option", [{"by": "mean"}, {"rejected": "worst"}, {"schema": "v2"}, {"min_rating": 2}])
def test_a_wrong_option_is_named_with_its_choices(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is .*choose one of"):
        Curator(**option)


def test_questions_and_ngram_are_checked():
    with pytest.raises(ValueError, match=r"'\?\?\?'.*nothing to compare; remove it"):
        Curator(decontaminate=["fine", "???"])
    with pytest.raises(ValueError, match="ngram is 2; give 3 or more"):
        Curator(ngram=2)


def rated(value):
    return record({**completion(("1",)), "annotations": {"honesty": {"Rating": value}}})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("text", "str 'text' is no record"),
        (None, "null is no record"),
        ({"prompt": "a", "chosen": "b"}, r"source is missing \(there is prompt, chosen\)"),
        ({"source": "a", "instruction": "b"}, "completions is missing"),
        ({"source": None, "instruction": "b", "completions": []}, "source must be a string, not null"),
        ({"source": "a", "instruction": ["b"], "completions": []}, "instruction must be a string, not list"),
        ({"source": "a", "instruction": "b", "completions": {"model": []}}, "completions must be a list"),
        (record("text"), r"completions\[0\]: a completion must be an object"),
        (record(completion(("1",)), {"model": "m", "response": 3}), r"completions\[1\]: response must be a string"),
        (record({"response": "x"}), r"completions\[0\]: model is missing"),
        (record({**completion(("1",)), "annotations": [1]}), "annotations must be an object of aspects"),
        (record({**completion(("1",)), "annotations": {"honesty": 4}}), "annotations.honesty must be an object"),
        (
            record({**completion(("1",)), "annotations": {"honesty": [{}, {}]}}),
            "honesty lists 2 annotations; leave one",
        ),
        (rated("6"), r"completions\[0\]: annotations.honesty.Rating is '6', not a number from 1 to 5; correct it"),
        (rated("0"), "Rating is '0'"),
        (rated(True), "Rating is True"),
        (rated(["4"]), r"Rating is \['4'\]"),
        (rated(float("nan")), "Rating is nan"),
        (rated("1e999999999"), "Rating is '1e999999999'"),
        (record(completion(("1",), 11)), r"completions\[0\]: overall_score is 11, not a number from 0 to 10"),
        (record(completion(("1",), "high")), "overall_score is 'high'"),
        (record(completion(("1",), response="\ud800"), completion(("2",))), r"half a surrogate pair, '\\ud800'"),
    ],
)
def test_a_malformed_record_is_named_with_key_and_remedy(raw, message):
    good = record(completion(("1",)), completion(("2",)))
    with pytest.raises(ValueError, match=rf"^record 2: .*{message}"):
        curate([good, raw])


def test_scores_may_be_strings_and_annotations_may_be_missing():
    scores = {"a": "8.5", "b": "N/A", "c": 3}
    raw = record(*({"model": "m", "response": name, "overall_score": scores[name]} for name in scores))
    pair, report = single(raw, by="overall_score")
    assert (pair["chosen_response"], pair["rejected_response"]) == ("a", "c")
    assert report.compared == 0
