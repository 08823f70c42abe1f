"""Lists and labelled completions from rows to tokens, against values worked out by hand."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from toys import toy_tokenizer

from notus.data import tokenize
from notus.data.chat import ChatEncoder
from notus.data.dataset import TokenizedDataset, mismatched
from notus.data.drop_report import DropReport
from notus.data.mixture import Share, hold_out
from notus.data.tokenize import Rule, load_labels, load_lists, load_pairs, load_sft, read_shares

EOS_ID = 2


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def listed(prompt: str, *completions: str | None, ratings: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completions": list(completions), "ratings": ratings}


def labelled(prompt: str, completion: str, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def lists(rows: Any, **settings: Any) -> tuple[TokenizedDataset, DropReport]:
    found, report = load_lists(rows, toy_tokenizer(), **{"max_length": 64, "max_prompt_length": 32, **settings})
    return TokenizedDataset(found), report


def labels(rows: Any, **settings: Any) -> tuple[TokenizedDataset, DropReport]:
    found, report = load_labels(rows, toy_tokenizer(), **{"max_length": 64, "max_prompt_length": 32, **settings})
    return TokenizedDataset(found), report


def bytes_of(text: str) -> list[int]:
    return [toy_tokenizer().convert_tokens_to_ids(character) for character in text]


def tokens(rows: TokenizedDataset) -> list[tuple[list[int], list[list[int]]]]:
    return [(each.trunk.tolist(), [ids.tolist() for ids in each.branches]) for each in rows(np.arange(len(rows)))]


def texts(rows: TokenizedDataset) -> list[list[str]]:
    """What each row's completions say, but for EOS."""
    decode = toy_tokenizer().decode
    return [[decode(ids).removesuffix("</s>").strip() for ids in branches] for _, branches in tokens(rows)]


class TestLists:
    def test_by_hand(self) -> None:
        rows, report = lists([listed("QQ", "X", "YZ", "K", ratings=[2, 4.5, 1]), listed("Q", "J", "Z", ratings=[1, 2])])
        q, x, y, z, k, j = bytes_of("QXYZKJ")
        assert tokens(rows) == [
            ([1, q, q], [[y, z, EOS_ID], [x, EOS_ID], [k, EOS_ID]]),
            ([1, q], [[z, EOS_ID], [j, EOS_ID]]),
        ]
        assert rows.num_branches == 3
        assert rows.loss_tokens.tolist() == [[3, 2, 2], [2, 2, 0]]
        np.testing.assert_array_equal(rows.ratings, [[4.5, 2, 1], [2, 1, np.nan]])
        assert rows.labels is None
        assert (report.read, report.kept, report.left_out) == (2, 2, 0)

    def test_what_is_missing_is_left_out_with_its_rating_and_counted(self, tmp_path: Path) -> None:
        rows = [
            listed("Q", " A", " \n", " B", None, " C", ratings=[1, 5, 3, 4, None]),
            listed("Q", " A", " B", ratings=[1, None]),
            listed("Q", " A", "", ratings=[1, 2]),
            listed("Q", " A", " A", " A", ratings=[1, 2, 3]),
            listed("Q", " D", " E", " D", ratings=[1, 2, 3]),
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found, report = lists(path)
        assert texts(found) == [["B", "A"], ["D", "E", "D"]]
        np.testing.assert_array_equal(found.ratings, [[3, 1, np.nan], [3, 2, 1]])
        assert found.info(0).place.endswith("a.jsonl, line 1")
        assert report.dropped == {"fewer than two rated completions": 2, "all completions identical": 1}
        assert (report.read, report.kept, report.left_out) == (5, 2, 3)
        assert "left out of the lists: 3 completions without a rating or without text" in str(report)

    def test_the_longest_decides_what_is_cut(self) -> None:
        # <s> and 6 prompt tokens, 3, 7 and 2 with EOS: the prompt keeps 4, of the 7 stay 8 - 4
        rows, report = lists(
            [listed("QQQQJK", "ZZ", "XXXXXX", "Y", ratings=[3, 2, 1])], max_length=8, max_prompt_length=4
        )
        q, j, k, x, y, z = bytes_of("QJKXYZ")
        assert tokens(rows) == [([q, q, j, k], [[z, z, EOS_ID], [x, x, x, x], [y, EOS_ID]])]
        assert rows.info(0).cut == (3, 0, 3, 0)
        assert (report.prompts_cut, report.completions_cut) == (1, 1)
        # each has its own copy of the prompt: 3 x 3 + 3 of 3 x 7 + 3 + 7 + 2 tokens
        assert report.cut_share == pytest.approx(12 / 33)

    def test_chats_share_the_prompt_once(self) -> None:
        turns = [{"role": "user", "content": "Q"}]
        row = {
            "prompt": turns,
            "completions": [[{"role": "assistant", "content": text}] for text in ("Z", "X", "Y")],
            "ratings": [1, 3, 2],
            "models": ["a", "b", "c"],
        }
        rows, report = lists([row])
        assert toy_tokenizer().decode(tokens(rows)[0][0]) == "<s><|user|>\nQ</s>\n<|assistant|>\n"
        assert texts(rows) == [["X", "Y", "Z"]]
        assert report.unknown_columns == ("models",)

    def test_pairs_are_lists_of_two(self) -> None:
        pairs = [{**pair("Q", "X", "Y"), "score_chosen": 2, "score_rejected": 3}, pair("Q", "J", "K")]
        rows, _ = lists(pairs)
        assert texts(rows) == [["Y", "X"], ["J", "K"]]
        np.testing.assert_array_equal(rows.ratings, [[3, 2], [np.nan, np.nan]])
        as_pairs = TokenizedDataset(load_pairs([pairs[1]], toy_tokenizer(), max_length=64, max_prompt_length=32)[0])
        assert bytes(rows.digests()[1]) == bytes(as_pairs.digests()[0])

    def test_ratings_are_no_part_of_what_is_computed(self) -> None:
        one, other = (lists([listed("Q", "X", "Y", "Z", ratings=each)])[0] for each in ([3, 2, 1], [9, 8, 7]))
        assert np.array_equal(one.digests(), other.digests())
        assert one.info(0).id == other.info(0).id


class TestLabels:
    def test_by_hand(self) -> None:
        rows, report = labels([labelled("Q", "X", True), labelled("Q", "Y", 0)])
        q, x, y = bytes_of("QXY")
        assert tokens(rows) == [([1, q], [[x, EOS_ID]]), ([1, q], [[y, EOS_ID]])]
        assert rows.labels.tolist() == [True, False]
        assert (rows.num_branches, rows.ratings, report.kept) == (1, None, 2)

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_a_pair_is_two_rows_side_by_side(self, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenize, "BATCH_ROWS", 2)
        pairs = [pair("Q" * n, "X", "Y") for n in range(1, 6)]
        pairs[1] |= {"chosen-rating": 4, "rejected-rating": 2, "source": "flan"}
        for _ in range(2):  # made, then from the cache
            rows, report = labels(pairs, num_workers=num_workers)
            assert texts(rows) == [["X"], ["Y"]] * 5
            assert rows.labels.tolist() == [True, False] * 5
            assert rows.trunk_lengths.tolist() == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
            assert (report.read, report.kept) == (10, 10)
        np.testing.assert_array_equal(rows.ratings[:4, 0], [np.nan, np.nan, 4, 2])
        assert rows.sources[2:4] == ["flan", "flan"]
        assert len({rows.info(index).id for index in range(10)}) == 10

    def test_the_same_completion_is_not_good_and_bad(self) -> None:
        rows, report = labels([pair("Q", "X", "X"), pair("Q", "", "Y"), labelled("Q", "Z", False)])
        assert texts(rows) == [["Y"], ["Z"]]
        assert rows.labels.tolist() == [False, False]
        assert report.dropped == {"empty completion": 1, "chosen and rejected identical": 2}

    @pytest.mark.parametrize("most", [1_000_000, 1])  # together, or each in a group of its own
    def test_a_completion_that_is_cut_to_the_same_tokens_is_not_good_and_bad(
        self, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenize, "MOST_CHARACTERS", most)
        pairs = [pair("QJ", "XXXXXXY", "XXXXXXZ"), pair("QJ", "Y", "Z")]
        rows, report = labels(pairs, max_length=8, max_prompt_length=4)
        assert texts(rows) == [["Y"], ["Z"]]
        assert report.dropped == {"chosen and rejected identical": 2}
        as_pairs = load_pairs(pairs, toy_tokenizer(), max_length=8, max_prompt_length=4)[1]
        assert as_pairs.dropped == {"chosen and rejected identical": 1}

    def test_the_last_answer_alone_is_learned(self) -> None:
        turns = [("user", "Q"), ("assistant", "X"), ("user", "J"), ("assistant", "Y")]
        row = {"messages": [{"role": role, "content": said} for role, said in turns], "kto_tag": "true"}
        rows, _ = labels([row], max_length=200, max_prompt_length=150)
        ((trunk, branches),) = tokens(rows)
        assert toy_tokenizer().decode(trunk).endswith("X</s>\n<|user|>\nJ</s>\n<|assistant|>\n")
        assert branches == [[*bytes_of("Y"), EOS_ID]]

    def test_labels_are_no_part_of_what_is_computed(self) -> None:
        one, other = (labels([labelled("Q", "X", label)])[0] for label in (True, False))
        assert np.array_equal(one.digests(), other.digests())
        demonstration = TokenizedDataset(
            load_sft([{"prompt": "Q", "completion": "X"}], toy_tokenizer(), max_length=64)[0]
        )
        assert np.array_equal(one.digests(), demonstration.digests())

    def test_a_long_prompt_is_cut_as_that_of_pairs(self) -> None:
        rows, _ = labels([labelled("QQQQJK", "XXXXXX", True)], max_length=8, max_prompt_length=4)
        q, j, k, x = bytes_of("QJKX")
        assert tokens(rows) == [([q, q, j, k], [[x, x, x, x]])]

    def test_a_cut_prompt_is_not_joined_with_its_own_other_answer(self) -> None:
        # the long answer of the first pair cuts its prompt, the short one does not: two trunks of one prompt
        rows, _ = labels([pair("QQQQJK", "XXXXXX", "Y"), pair("J", "Z", "ZZ")], max_length=10, max_prompt_length=4)
        assert rows.trunk_lengths.tolist() == [4, 7, 2, 2]
        others = mismatched(rows, 10)
        assert texts(others) == [["Z"], ["ZZ"], ["XXXXXX"], ["Y"]]
        assert others.trunk_lengths.tolist() == [4, 7, 2, 2]
        # the same with the cut row at the end: past it stands its own prompt
        rows, _ = labels(
            [labelled("QQQQJK", "Y", False), labelled("J", "Z", True), labelled("QQQQJK", "XXXXXX", True)],
            max_length=10,
            max_prompt_length=4,
        )
        assert texts(mismatched(rows, 10)) == [["Z"], ["XXXXXX"], ["Z"]]


def shares(rows: list[Any], task: Any) -> list[Share]:
    return read_shares(rows, Rule(ChatEncoder(toy_tokenizer()), task, 64, 32))[0]


@pytest.mark.parametrize("seed", range(4))
def test_no_copy_of_a_held_out_row_is_trained_on_whatever_its_label(seed: int) -> None:
    rows = [labelled("Q" * n, "X", label) for n in range(1, 7) for label in (True, False)]
    left, held, copies = hold_out(shares(rows, "labels"), 3, seed)
    trained, evaluated = ({tuple(each["trunk"]) for each in part} for part in (left[0].rows, held))
    assert (len(held), copies) == (3, 3)
    assert not trained & evaluated


@pytest.mark.parametrize("seed", range(4))
def test_no_copy_of_a_held_out_list_is_trained_on_whatever_its_ratings(seed: int) -> None:
    rows = [
        listed("Q" * n, *"XYZ"[:k], ratings=[5, 4, scale][:k]) for n in range(1, 5) for k in (2, 3) for scale in (1, 2)
    ]
    left, held, copies = hold_out(shares(rows, "lists"), 3, seed)
    key = [{(len(each["trunk"]), len(each["branches"])) for each in part} for part in (left[0].rows, held)]
    assert (len(held), copies) == (3, 3)
    assert not key[0] & key[1]
    assert len(key[0]) == 8 - 3
