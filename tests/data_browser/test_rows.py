"""Rows and what is known of them: flags, duplicates, overlap, order."""

import dataclasses
import json

import numpy as np
import pytest
from rows_of_data import LABELLED, LISTS, PAIR, load_data, write_config, write_rows

from notus.data_browser.rows import as_json
from notus.data_browser.terminal import report_lines

pytestmark = pytest.mark.usefixtures("device")


def numbered(count):
    return [{**PAIR, "prompt": f"Sea {number}"} for number in range(count)]


def test_a_row_that_stands_twice_is_a_duplicate(tmp_path, model_folder):
    data = load_data(write_config(tmp_path, model_folder, [*numbered(3), *numbered(2)]))
    assert ["duplicate" in data.row(index).flags for index in range(5)] == [False, False, False, True, True]
    assert data.flag_counts["duplicate"] == 2
    assert data.row(0).id == data.row(3).id


def test_prompts_of_the_other_split_overlap_and_whole_rows_never_do(tmp_path, model_folder):
    rows = numbered(5)
    held_out = write_rows(tmp_path / "eval.jsonl", [{**rows[2], "chosen": " another"}, rows[3], rows[4]])
    config = write_config(tmp_path, model_folder, rows[:4], data__eval=str(held_out))
    train, evaluated = load_data(config), load_data(config, "eval")
    assert ["prompt in both splits" in train.row(index).flags for index in range(3)] == [False, False, True]
    assert ["prompt in both splits" in evaluated.row(index).flags for index in range(3)] == [True, False, False]
    assert (len(train), train.report.held) == (3, 1)


def test_marked_ids_are_what_data_exclude_leaves_out(tmp_path, model_folder):
    config = write_config(tmp_path, model_folder, numbered(4))
    ids = [load_data(config).row(index).id for index in (1, 3)]
    (tmp_path / "marked.txt").write_text("\n".join(ids) + "\n")
    left = load_data(write_config(tmp_path, model_folder, numbered(4), data__exclude=str(tmp_path / "marked.txt")))
    assert [left.row(index).place.rpartition(", ")[2] for index in range(2)] == ["line 1", "line 3"]
    assert (len(left), left.report.dropped) == (2, {"excluded by data.exclude": 2})


def test_ratings_are_reversed_only_if_the_chosen_has_less(tmp_path, model_folder):
    ratings = [(4, 3), (3, 4), (3, 3), (None, 4)]
    rows = [
        {**row, "chosen-rating": chosen, "rejected-rating": rejected}
        for row, (chosen, rejected) in zip(numbered(4), ratings, strict=True)
    ]
    data = load_data(write_config(tmp_path, model_folder, rows))
    assert ["reversed ratings" in data.row(index).flags for index in range(4)] == [False, True, False, False]


def test_margins_order_the_rows_by_the_most_wrongly_ordered(tmp_path, model_folder):
    data = load_data(write_config(tmp_path, model_folder, numbered(4)))
    assert list(data.order) == [0, 1, 2, 3]
    ranked = data.with_margins(np.array([0.5, -2.0, 3.0, -0.1]))
    assert list(ranked.order) == [1, 3, 0, 2]
    assert ranked.row(1).margin == -2.0


def of_loss(folder, model_folder, rows, loss_type):
    return load_data(write_config(folder, model_folder, rows, dpo__loss_type=loss_type))


def said(data, index):
    row = data.row(index)
    return [data.pieces.text(branch.ids).removesuffix("</s>").strip() for branch in row.branches]


def test_lists_are_shown_best_first_with_their_ratings(tmp_path, model_folder):
    data = of_loss(tmp_path, model_folder, LISTS, "plackett_luce")
    assert (data.task, data.names) == ("lists", ["completion 1", "completion 2", "completion 3"])
    assert [said(data, index) for index in range(2)] == [["blue.", "grey.", "red."], ["green.", "low."]]
    first, second = data.row(0), data.row(1)
    assert (first.ratings, second.ratings, first.label) == ((4.2, 3.0, 1.0), (2.0, 2.0), None)
    assert second.names == ("completion 1", "completion 2")
    assert {name: len(values) for name, values in data.lengths.items()} == {
        "prompt": 2, "completion 1": 2, "completion 2": 2, "completion 3": 1,
    }  # fmt: skip
    lines = report_lines(data)
    assert "completions: 2 in 1 row, 3 in 1 row" in lines
    assert not any("rated below" in line for line in lines)
    told = json.loads(as_json(first, data.pieces))
    assert (told["ratings"], told["label"], len(told["branches"])) == ([4.2, 3.0, 1.0], None, 3)


def test_lists_whose_ratings_tie_or_reverse_have_no_flag(tmp_path, model_folder):
    rows = [{**PAIR, "chosen-rating": 1, "rejected-rating": 2}]
    data = of_loss(tmp_path, model_folder, rows, "plackett_luce")
    assert said(data, 0) == ["red.", "blue."]  # by their ratings
    assert data.flag_counts == {"plain text": 1}
    assert data.names == ["completion 1", "completion 2"]


def test_labels_are_shown_with_how_many_are_good(tmp_path, model_folder):
    data = of_loss(tmp_path, model_folder, [*LABELLED, PAIR], "kto")
    assert (data.task, data.names, len(data)) == ("labels", ["completion"], 4)
    assert [data.row(index).label for index in range(4)] == [True, False, True, False]
    assert "labels: 2 true, 2 false" in report_lines(data)
    assert json.loads(as_json(data.row(1), data.pieces))["label"] is False
    row = as_json(dataclasses.replace(data.row(1), source="naïve"), data.pieces, escape=True)
    assert row.isascii()
    assert json.loads(row)["source"] == "naïve"


def test_rows_of_another_loss_are_an_error_as_in_training(tmp_path, model_folder):
    with pytest.raises(ValueError, match=r"line 1.*plackett_luce"):
        load_data(write_config(tmp_path, model_folder, LISTS))
    with pytest.raises(ValueError, match=r"line 1.*kto"):
        load_data(write_config(tmp_path, model_folder, LABELLED))
