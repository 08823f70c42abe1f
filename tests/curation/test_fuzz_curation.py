"""Curation, over records of every kind."""

import io
import json
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

from fuzzing import fuzz, replaced, texts
from hypothesis import given
from hypothesis import strategies as st

from notus.curation.command import write_rows
from notus.curation.decontamination import CONTAINED, EQUAL, Questions, normalized
from notus.curation.ultrafeedback import REJECTED, RULES, Curator, curate
from notus.data.sources import read_file

ratings = st.sampled_from(["1", "2", "3", "4", "5", 1, 3, 5, 2.5, "4.25", 4.999999999999999, "N/A", None])
aspects = st.none() | st.builds(lambda rating: {"Rating": rating, "Rationale": "r"}, ratings)
annotations = st.none() | st.dictionaries(
    st.sampled_from(["helpfulness", "honesty", "truthfulness"]), aspects | aspects.map(lambda item: [item])
)
completions = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["a", "b", "ü"]),
        "response": texts,
        "annotations": annotations,
        "overall_score": st.sampled_from([0, 1, 7.5, "8", 10, "N/A", None]),
    }
)
records = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["sharegpt", "truthful_qa", ""]),
        "instruction": texts,
        "completions": st.lists(completions, max_size=5),
    }
)
options = st.fixed_dictionaries(
    {
        "by": st.sampled_from(RULES),
        "rejected": st.sampled_from(REJECTED),
        "keep_identical": st.booleans(),
        "seed": st.integers(),
        "drop_sources": st.sampled_from([(), ("truthful_qa",)]),
        "decontaminate": st.lists(texts.filter(normalized), max_size=2),
    }
)


def exact(value: Any) -> Fraction | None:
    return None if value in (None, "N/A") else Fraction(str(value))


def score(completion: dict[str, Any], by: str) -> Fraction | None:
    """The completion's score, worked out anew."""
    if by == "overall_score":
        return exact(completion["overall_score"])
    found = [item[0] if isinstance(item, list) else item for item in (completion["annotations"] or {}).values()]
    rated = [exact(item["Rating"]) for item in found if item is not None and exact(item["Rating"]) is not None]
    return sum(rated, start=Fraction(0)) / len(rated) if rated else None


@fuzz(150)
@given(st.lists(records, max_size=5), options)
def test_pairs_are_in_strict_order_and_every_record_is_accounted_for(
    found: list[dict[str, Any]], chosen: dict[str, Any]
) -> None:
    pairs, report = curate(found, **chosen)
    assert report.records.total() == len(found)
    assert report.pairs.total() == len(pairs) == len(found) - report.dropped.total()
    assert 0 <= report.differing <= report.compared <= len(found)
    assert str(report)
    assert curate(found, **chosen)[0] == pairs
    again = [curate([record], **chosen)[0] for record in found]  # a record's pair depends on no other record
    assert [pair for single in again for pair in single] == pairs
    for record, single in zip(found, again, strict=True):
        for pair in single:
            check_pair(pair, record, chosen["by"], chosen["rejected"])
            assert chosen["keep_identical"] or pair["chosen_response"].strip() != pair["rejected_response"].strip()


def check_pair(pair: dict[str, Any], record: dict[str, Any], by: str, rejected: str) -> None:
    scored = [(score(item, by), item["response"]) for item in record["completions"]]
    scored = [(value, response) for value, response in scored if value is not None]
    best = max(value for value, _ in scored)
    first = next(i for i, (value, _) in enumerate(scored) if value == best)
    assert pair["chosen_response"] == scored[first][1]
    assert pair["chosen_avg_rating"] == float(best)
    others = [item for i, item in enumerate(scored) if (item[0] < best if rejected == "lower" else i != first)]
    assert (pair["rejected_avg_rating"], pair["rejected_response"]) in {(float(v), response) for v, response in others}
    assert (pair["instruction"], pair["source"]) == (record["instruction"], record["source"])


@fuzz(100)
@given(st.lists(records, max_size=4), options)
def test_both_schemas_hold_the_same_pairs_and_files_give_them_back(
    found: list[dict[str, Any]], chosen: dict[str, Any]
) -> None:
    (v1, _), (cleaned, _) = (curate(found, **chosen, schema=schema) for schema in ("v1", "cleaned"))
    for old, new in zip(v1, cleaned, strict=True):
        assert [message["content"] for message in new["chosen"]] == [old["instruction"], old["chosen_response"]]
        assert [message["content"] for message in new["rejected"]] == [old["instruction"], old["rejected_response"]]
        assert (new["chosen-rating"], new["rejected-rating"]) == (old["chosen_avg_rating"], old["rejected_avg_rating"])
    for pairs in (v1, cleaned):
        for suffix in (".jsonl", ".parquet"):
            if pairs:
                assert written_and_read(pairs, suffix) == pairs


def written_and_read(pairs: list[dict[str, Any]], suffix: str) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder, io.BytesIO() as file:
        write_rows(file, pairs, suffix)
        path = Path(folder) / f"pairs{suffix}"
        path.write_bytes(file.getvalue())
        return [row for _, row in read_file(path)]


pieces = st.sampled_from(["a", "b", "c", "A", "B", ", ", "? ", "\n"])
asked = st.lists(pieces, min_size=1, max_size=14).map(" ".join)


@fuzz(300)
@given(st.lists(asked.filter(normalized), max_size=4), st.lists(pieces, max_size=40).map(" ".join), st.integers(3, 9))
def test_a_question_is_found_where_the_rule_says(listed: list[str], prompt: str, ngram: int) -> None:
    match = Questions(listed, ngram).find(prompt)
    equal = [question for question in listed if normalized(question) == normalized(prompt)]
    contained = [question for question in listed if is_contained(question, prompt, ngram)]
    if equal:
        assert match == (EQUAL, equal[0])
    else:
        assert match == ((CONTAINED, contained[0]) if contained else None)


def is_contained(question: str, prompt: str, ngram: int) -> bool:
    """The rule anew, by comparing every part of the question with every part of the prompt."""
    wanted, words, begins, ends = normalized(question).split(), [], set(), set()
    for piece in prompt.split(" "):  # every word is one letter
        if piece.strip() in ("", ",", "?"):
            if piece:
                ends.add(len(words))
                begins.add(len(words))
            continue
        if piece.isupper():
            begins.add(len(words))
        words.append(piece.lower())
    begins.add(0)
    ends.add(len(words))
    length = min(ngram, len(wanted))
    held = set()
    for start in range(len(wanted) - length + 1):
        for place in range(len(words) - length + 1):
            if words[place : place + length] == wanted[start : start + length]:
                as_a_clause = place in begins and place + length in ends and length >= 3
                if length >= min(ngram, 5) or as_a_clause:
                    held.update(range(start, start + length))
    return 2 * len(held) > len(wanted)


@fuzz(300)
@given(records, st.data(), st.sampled_from([0, 1]))
def test_a_malformed_record_is_a_pair_a_drop_or_a_clear_error(
    record: dict[str, Any], data: st.DataObject, min_rating: int
) -> None:
    record = json.loads(json.dumps(replaced(record, data)))
    curator = Curator(min_rating=min_rating)
    try:
        pairs = list(curator.rows([("place", record)]))
    except ValueError as error:
        told = str(error)
        assert told.startswith("place: ")
        assert len(told) < 1000
        return
    assert len(pairs) + curator.report.dropped.total() == curator.report.records.total() == 1
    assert str(curator.report)
