"""Rows as lines of text."""

import numpy as np
import pytest
from toys import toy_tokenizer

from notus.data.display import Pieces
from notus.data_browser.rows import Branch, Row
from notus.data_browser.terminal import row_lines, spark


def test_bars_are_blank_only_where_nothing_is():
    assert spark([0, 1, 50, 100]) == " ▁▅█"
    assert spark([1]) == "█"


def test_a_list_says_how_each_of_its_completions_is_rated():
    ids = np.array(toy_tokenizer()("sea</s>", add_special_tokens=False)["input_ids"])
    branch, names = Branch(ids, np.ones(len(ids), bool)), ("completion 1", "completion 2", "completion 3")
    row = Row(
        0, "0123456789abcdef", "lists.jsonl, line 1", None, names, (4.5, 3.0, 3.0), None,
        (0, 0, 0, 2), (), np.array([1]), (branch,) * 3,
    )  # fmt: skip
    lines = row_lines(row, Pieces(toy_tokenizer()))
    assert lines[1:3] == [
        "ratings 4.5 completion 1, 3 completion 2, 3 completion 3",
        "cut: 2 tokens of completion 3",
    ]
    assert [line.split(",")[0] for line in lines if line.startswith("--- completion")] == [f"--- {n}" for n in names]


@pytest.mark.parametrize(("label", "said"), [(True, "label true: a good"), (False, "label false: a bad")])
def test_a_labelled_completion_says_its_label(label, said):
    branch = Branch(np.array([1]), np.ones(1, bool))
    row = Row(0, "0", "rows.jsonl, line 1", None, ("completion",), None, label, (0, 0), (), np.array([1]), (branch,))
    assert row_lines(row, Pieces(toy_tokenizer()))[1] == f"{said} completion"


def test_a_row_says_all_that_is_known_of_it():
    ids = np.array(toy_tokenizer()("sea</s>", add_special_tokens=False)["input_ids"])
    mask = np.arange(len(ids)) >= len(ids) - 1
    row = Row(
        7, "0123456789abcdef", "pairs.jsonl, line 8", "mine", ("chosen", "rejected"), (4.5, None), None,
        (12, 0, 3), ("cut", "glued"),
        np.array([1]), (Branch(ids, mask), Branch(ids, ~mask)), -0.25,
    )  # fmt: skip
    lines = row_lines(row, Pieces(toy_tokenizer()), ids=True)
    *start, last = map(str, ids)
    assert lines == [
        "row 7  0123456789abcdef  pairs.jsonl, line 8",
        "source mine; ratings 4.5 chosen, unknown rejected; reward margin -0.2500; flags: cut, glued",
        "cut: 12 tokens of the prompt, 3 tokens of rejected",
        "--- prompt, 1 token", "<s>", "ids: 1",
        f"--- chosen, {len(ids)} tokens, 1 learned", "sea⟦</s>⟧", f"ids: {' '.join(start)} ⟦{last}⟧",
        f"--- rejected, {len(ids)} tokens, {len(ids) - 1} learned", "⟦sea⟧</s>", f"ids: ⟦{' '.join(start)}⟧ {last}",
    ]  # fmt: skip
