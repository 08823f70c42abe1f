"""The rule that turns rated completions into preference pairs."""

import hashlib
import random
from fractions import Fraction

import pytest

from notus.curation.ultrafeedback import CONTAMINATED, SOURCE, TIED, TOO_FEW, Curator, curate, mean_rating, normalized

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


def test_every_dropped_record_has_one_counted_reason():
    low, high, unrated = completion(("1",), 1), completion(("5",), 9), completion(("N/A",), None)
    raws = [
        record(low, high),
        record(low, unrated),
        record(),
        record(low, low, unrated),
        record(low, high, source="truthful_qa"),
        record(low, high, instruction="Is it?"),
    ]
    pairs, report = curate(raws, decontaminate=["is IT"], drop_sources=["truthful_qa"])
    assert len(pairs) == 1
    assert report.dropped == {TOO_FEW: 2, TIED: 1, SOURCE: 1, CONTAMINATED: 1}
    assert report.records == {"flan": 5, "truthful_qa": 1}
    assert report.pairs == {"flan": 1}
    assert report.compared == 1
    text = str(report)
    assert "6 records -> 1 pairs by ratings" in text
    assert "fewer than two scored completions: 2" in text
    assert "from flan: 1 of 5" in text
    assert "note:" not in text
    assert "note: training on pairs from truthful_qa" in str(curate(raws)[1])


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


@pytest.mark.parametrize(
    ("text", "comparable"),
    [
        ("What  happens,\n if you eat seeds?", "what happens if you eat seeds"),
        ("Can’t — STRASSE “Straße”…", "can t strasse strasse"),
        ("ﬁve Ｆｕｌｌ①", "five full1"),
        ("1 + 1 = 2", "1 + 1 = 2"),
        ("कि का", "कि का"),
        ("?!", ""),
    ],
)
def test_normalized(text, comparable):
    assert normalized(text) == comparable


def test_decontamination_needs_something_to_compare():
    with pytest.raises(ValueError, match=r"'\?\?\?'.*nothing to compare; remove it"):
        Curator(decontaminate=["fine", "???"])


def test_min_rating_zero_averages_zeros_in():
    raw = record(completion(("0", "2", "2")), completion(("2",)))
    with pytest.raises(ValueError, match="--min-rating 0"):
        curate([raw])
    pair, _ = single(raw, min_rating=0)
    assert (pair["chosen_avg_rating"], pair["rejected_avg_rating"]) == (2.0, 4 / 3)


@pytest.mark.parametrize("option", [{"by": "mean"}, {"schema": "v2"}, {"min_rating": 2}])
def test_a_wrong_option_is_named_with_its_choices(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is .*choose one of"):
        Curator(**option)


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
