"""Rows and what is known of them: flags, duplicates, overlap, order."""

import numpy as np
import pytest
from rows_of_data import PAIR, load_data, write_config, write_rows

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
