"""What texts share is computed once, no row is too long, and every text is scored where it stands."""

import random

import numpy as np
import pytest

from notus.evaluation.open_llm.scoring import Text, collate_texts, plan_rows, share, texts_of
from notus.model.flops import Dimensions


def text(ids, scored=1):
    return Text(np.array(ids, dtype=np.int32), scored)


def layout(texts, tokens_per_row=100):
    return [
        [(group.trunk, [ids.tolist() for ids in group.inputs], group.wanted) for group in row]
        for row in plan_rows(texts, tokens_per_row)
    ]


def test_options_share_their_question():
    question = [5, 6, 7, 8]
    texts = [text([*question, 1, 2], 2), text([*question, 3], 1), text([*question, 4, 9, 9], 3)]
    # what is read: 5678 1, 5678 (the beginning of the others), 5678 4 9
    assert layout(texts) == [[(4, [[5, 6, 7, 8, 1], [5, 6, 7, 8, 4, 9]], [[1, 0], [2]])]]


def test_options_of_one_token_are_read_off_one_input():
    assert layout([text([5, 6, 1]), text([5, 6, 2]), text([5, 6, 3])]) == [[(0, [[5, 6]], [[0, 1, 2]])]]


def test_questions_share_the_examples_that_stand_before_all():
    shots = list(range(10, 30))
    texts = [text([*shots, 40 + q, 41 + q, 60 + option, 1]) for q in range(3) for option in range(2)]
    ((group,),) = plan_rows(texts, 100)
    assert group.trunk == 20
    assert group.tokens == 20 + 6 * 3


def test_a_trunk_is_not_given_up_for_a_little_one():
    texts = [text([1, *range(100, 130), option, 0]) for option in (7, 8, 9)] + [text([1, 50, 51, 52, 53])]
    (row,) = plan_rows(texts, 100)
    assert sorted((group.trunk, len(group.inputs)) for group in row) == [(0, 1), (31, 3)]


def test_rows_are_full_but_not_over_and_the_longest_come_first():
    generator = random.Random(0)
    for _ in range(50):
        alphabet = generator.choice([2, 3, 50])
        texts = [
            text([generator.randrange(alphabet) for _ in range(generator.randint(2, 20))])
            for _ in range(generator.randint(1, 40))
        ]
        rows = plan_rows(texts, 24)
        assert all(sum(group.tokens for group in row) <= 24 for row in rows)
        assert sorted(index for row in rows for index in texts_of(row)) == list(range(len(texts)))
        first = [row[0].tokens for row in rows]
        assert first == sorted(first, reverse=True)
        for row in rows:
            batch = collate_texts(row, texts)
            sources = np.split(batch.sources.numpy(), np.cumsum(batch.lengths.flatten().numpy())[:-1])
            for index, where in zip(texts_of(row), sources, strict=True):
                wanted = texts[index]
                assert batch.input_ids[where].tolist() == wanted.ids[-wanted.scored - 1 : -1].tolist()
                assert batch.position_ids[where].tolist() == [len(wanted.ids) - 2]


def test_keys_gathered_in_a_row_are_bounded():
    shots = list(range(100, 180))
    texts = [text([*shots, index, 0]) for index in range(20)]
    rows = plan_rows(texts, 90)  # a row has room for ten branches of one token, but eight times its keys: 8 branches
    assert [[len(group.inputs) for group in row] for row in rows] == [[8], [8], [4]]


@pytest.mark.parametrize(
    ("ranks", "tokens"), [(1, [[50, 40, 30, 21]]), (2, [[50, 21], [40, 30]]), (3, [[30, 21], [50], [40]])]
)
def test_rows_are_shared_by_cost(ranks, tokens):
    rows = plan_rows([text([length] * (length + 1)) for length in (30, 50, 21, 40)], 50)
    size = Dimensions(layers=1, attention_width=1, body_weights=10**6, head_weights=1)
    shares = [share(rows, size, rank, ranks) for rank in range(ranks)]
    assert [[group.tokens for row in mine for group in row] for mine in shares] == tokens
    assert [share([], size, rank, ranks) for rank in range(ranks)] == [[]] * ranks
