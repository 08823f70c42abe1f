"""Records to lists of rated completions: the rule, the command, and the way to the rows that are trained on."""

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from fuzzing import fuzz, replaced
from hypothesis import given
from hypothesis import strategies as st
from toys import toy_tokenizer

from notus.curation import command
from notus.curation.decontamination import CONTAINED, EQUAL
from notus.curation.ultrafeedback import ALL_IDENTICAL, SOURCE, TOO_FEW, ListCurator, curate_lists
from notus.data.dataset import TokenizedDataset
from notus.data.tokenize import load_lists

SCORES = st.sampled_from(["1", "2.5", 5, "N/A", None])


def completion(rating: Any, response: str, *, model: str = "m", overall: Any = 5.0) -> dict[str, Any]:
    annotations = {"honesty": {"Rating": rating}, "helpfulness": {"Rating": "N/A"}}
    return {"model": model, "response": response, "annotations": annotations, "overall_score": overall}


def record(*completions: dict[str, Any], instruction: str = "What?", source: str = "flan") -> dict[str, Any]:
    return {"source": source, "instruction": instruction, "completions": list(completions)}


FOUR = record(
    completion("2", "fair", model="a", overall=9),
    completion("4.5", "best", model="b", overall=1),
    completion("N/A", "unrated", model="c", overall=5),
    completion("1", "poor", model="d", overall="N/A"),
)


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_all_scored_completions_stay_in_their_order() -> None:
    lists, report = curate_lists([FOUR])
    assert lists == [
        {
            "source": "flan",
            "prompt": [{"role": "user", "content": "What?"}],
            "completions": [says("fair"), says("best"), says("poor")],
            "ratings": [2.0, 4.5, 1.0],
            "models": ["a", "b", "d"],
        }
    ]
    assert (report.unscored, dict(report.sizes), report.tied, report.empty) == (1, {3: 1}, 0, 0)
    assert "1 records -> 1 lists of 3 completions, rated by ratings" in str(report)


def test_by_names_the_rating() -> None:
    (row,), _ = curate_lists([FOUR], by="overall_score")
    assert (row["ratings"], row["models"]) == ([9.0, 1.0, 5.0], ["a", "b", "c"])


def test_every_record_is_a_list_or_has_one_counted_reason() -> None:
    a, b, tied = completion("1", "a"), completion("2", "b"), completion("1", "c")
    records = [
        record(a, b),
        record(a, tied),
        record(a, completion("2", " ")),
        record(a),
        record(a, completion(None, "b")),
        record(a, completion("2", " a ")),
        record(a, b, source="truthful_qa"),
        record(a, b, instruction="Name it?"),
        record(a, b, instruction="Please. Who ate the last cake? Thanks."),
    ]
    lists, report = curate_lists(
        records, drop_sources=["truthful_qa"], decontaminate=["name it", "Who ate the last cake?"]
    )
    assert len(lists) == report.made.total() == 3
    assert report.dropped == {TOO_FEW: 2, ALL_IDENTICAL: 1, SOURCE: 1, EQUAL: 1, CONTAINED: 1}
    assert (report.tied, report.empty, report.repeated_prompts, report.unscored) == (1, 1, 2, 1)
    assert "kept, though all completions have the same score: 1" in str(report)
    assert "'Who ate the last cake?' in 'Please. Who ate" in str(report)


def test_min_rating_averages_zeros_in() -> None:
    raw = record(completion("0", "a"), completion("2", "b"))
    with pytest.raises(ValueError, match=r"record 1: completions\[0\].*--min-rating 0"):
        curate_lists([raw])
    assert curate_lists([raw], min_rating=0)[0][0]["ratings"] == [0.0, 2.0]


def test_half_a_surrogate_pair_is_named() -> None:
    with pytest.raises(ValueError, match="record 1: a string holds half a surrogate pair"):
        curate_lists([record(completion("1", "a\ud83d"), completion("2", "b"))])


@fuzz(100)
@given(
    st.lists(st.tuples(SCORES, st.sampled_from(["a", "b", " a", ""])), max_size=5), st.data(), st.sampled_from([0, 1])
)
def test_a_malformed_record_is_a_list_a_drop_or_a_clear_error(
    drawn: list[Any], data: st.DataObject, min_rating: int
) -> None:
    raw = record(*(completion(*each) for each in drawn))
    raw = json.loads(json.dumps(replaced(raw, data)))
    curator = ListCurator(min_rating=min_rating)
    try:
        rows = list(curator.rows([("place", raw)]))
    except ValueError as error:
        told = str(error)
        assert told.startswith("place: ")
        return
    assert len(rows) + curator.report.dropped.total() == curator.report.records.total() == 1
    for row in rows:
        assert len(row["completions"]) == len(row["ratings"]) == len(row["models"]) >= 2
    assert str(curator.report)


# --- the command ---


def run(*arguments: Any) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_holds_the_lists(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = [FOUR, record(completion("1", "a")), record(completion(3, "x"), completion(2, "y"), instruction="Why?")]
    output = tmp_path / f"lists{suffix}"
    assert run(write(tmp_path / "in.jsonl", records), output, "--listwise") == 0
    assert read(output) == curate_lists(records)[0]
    assert "3 records -> 2 lists of 5 completions" in capsys.readouterr().out


def test_parquet_is_written_in_parts_of_the_same_types(tmp_path: Path) -> None:
    records = [
        record(
            *(completion(1 + (number + each) % 5, f"r{each}") for each in range(2 + number % 3)),
            instruction=f"q{number}",
        )
        for number in range(5000)
    ]
    output = tmp_path / "lists.parquet"
    run(write(tmp_path / "in.jsonl", records), output, "--listwise")
    found = read(output)
    assert len(found) == 5000
    assert found == curate_lists(records)[0]
    assert pyarrow.parquet.ParquetFile(output).num_row_groups == 2


def test_options_reach_the_rule(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [FOUR, {**FOUR, "source": "other"}]), tmp_path / "out.jsonl"
    questions = tmp_path / "questions.txt"
    questions.write_text("What?\n")
    run(source, output, "--listwise", "--by", "overall_score", "--drop-source", "other")
    assert [row["ratings"] for row in read(output)] == [[9.0, 1.0, 5.0]]
    with pytest.raises(ValueError, match="no list is left, for the reasons above"):
        run(source, output, "--listwise", "--decontaminate", questions)


@pytest.mark.parametrize(
    "options",
    [["--rejected", "lower"], ["--schema", "v1"], ["--seed", "42"], ["--keep-identical"]],
    ids=lambda options: options[0],
)
def test_options_of_pairs_are_an_error(tmp_path: Path, options: list[str]) -> None:
    source = write(tmp_path / "in.jsonl", [FOUR])
    with pytest.raises(ValueError, match=f"{options[0]} has no effect with --listwise"):
        run(source, tmp_path / "out.jsonl", "--listwise", *options)
    assert run(source, tmp_path / "out.jsonl", *options) == 0


# --- from records to rows ---


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_curated_lists_become_rows_best_first(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    looks_like_messages = json.dumps([{"role": "user", "content": "Hello?"}])
    texts = {2: "Xa", 5: "Xb", 1: looks_like_messages, 4: "\n\nHuman: Hi"}
    records = [
        record(*(completion(rating, text) for rating, text in texts.items()), instruction=looks_like_messages),
        record(completion("1", "one"), completion("3", "two"), completion("2", " "), instruction="Why?"),
    ]
    output = tmp_path / f"lists{suffix}"
    run(write(tmp_path / "in.jsonl", records), output, "--listwise")
    tokenizer = toy_tokenizer()
    found, report = load_lists(str(output), tokenizer, max_length=400, max_prompt_length=200)
    rows = TokenizedDataset(found)
    said = [[tokenizer.decode(ids).removesuffix("</s>") for ids in example.branches] for example in rows(np.arange(2))]
    assert said == [[texts[5], texts[4], texts[2], texts[1]], ["two", "one"]]
    assert tokenizer.decode(rows(np.array([0]))[0].trunk) == f"<s><|user|>\n{looks_like_messages}</s>\n<|assistant|>\n"
    np.testing.assert_array_equal(rows.ratings, [[5, 4, 2, 1], [3, 1, np.nan, np.nan]])
    assert (rows.num_branches, rows.sources, report.left_out) == (4, ["flan", "flan"], 1)
    assert report.unknown_columns == ("models",)
