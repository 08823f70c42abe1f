"""Rows as lines of text."""

import numpy as np
from toys import toy_tokenizer

from notus.data.display import Pieces
from notus.data_browser.rows import Branch, Row
from notus.data_browser.terminal import row_lines, spark


def test_bars_are_blank_only_where_nothing_is():
    assert spark([0, 1, 50, 100]) == " ▁▅█"
    assert spark([1]) == "█"


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
