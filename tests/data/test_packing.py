"""The layout of packed rows."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notus.data.packing import Example, build_layout, collate, filler


def example(index, trunk, branches, masks=None):
    masks = masks or [[1] * len(branch) for branch in branches]
    return Example(
        index,
        np.array(trunk, dtype=np.int32),
        tuple(np.array(branch, dtype=np.int32) for branch in branches),
        tuple(np.array(mask, dtype=bool) for mask in masks),
    )


def test_collate_by_hand():
    # Row:      10 11 | 20 21 | 30 || 12 | 40 | 50 51 52
    # position:  0  1    2  3    2     0    1    1  2  3
    first = example(4, [10, 11], [[20, 21], [30]], [[1, 1], [1]])
    second = example(9, [12], [[40], [50, 51, 52]], [[1], [0, 1, 1]])
    batch = collate([first, second], 2)
    assert batch.input_ids.tolist() == [10, 11, 20, 21, 30, 12, 40, 50, 51, 52]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 1, 2, 3]
    # Each branch's first token is predicted from the trunk's end; the rest from their predecessor.
    assert batch.sources.tolist() == [1, 2, 1, 5, 7, 8]
    assert batch.targets.tolist() == [20, 21, 30, 40, 51, 52]
    assert batch.lengths.tolist() == [[2, 1], [1, 2]]
    assert batch.weights.tolist() == [1.0, 1.0]
    assert batch.indices.tolist() == [4, 9]
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.sources, batch.targets)} == {torch.int64}


def test_collate_of_different_numbers_of_branches():
    # Row:      10 | 20 21 || 11 | 30 | 40 41 | 50
    # position:  0    1  2     0    1    1  2    1
    two = example(4, [11], [[30], [40, 41], [50]], [[1], [0, 1], [1]])
    batch = collate([example(3, [10], [[20, 21]]), two], 4)
    assert batch.input_ids.tolist() == [10, 20, 21, 11, 30, 40, 41, 50]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 1, 2, 1]
    assert batch.lengths.tolist() == [[2, 0, 0, 0], [1, 1, 1, 0]]
    assert batch.present.tolist() == [[True, False, False, False], [True, True, True, False]]
    assert batch.sources.tolist() == [0, 1, 3, 5, 3]
    assert batch.targets.tolist() == [20, 21, 30, 41, 50]
    assert batch.layout.query_lengths == [3, 2, 2, 1]
    assert batch.layout.key_lengths == [3, 2, 3, 2]


def test_layout_by_hand():
    # Example 1: trunk 0 1, branches 2 3 | 4; example 2: trunk 5, branches 6 | 7 8 9.
    # Gather:   0 1 2 3 | 0 1 4 | 5 6 | 5 7 8 9
    # place:    0 1 2 3   4 5 6   7 8   9 10 11 12
    layout = build_layout([2, 1], [[2, 1], [1, 3]])
    assert layout.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8, 9]
    assert layout.first_copy.tolist() == [0, 1, 2, 3, 6, 7, 8, 10, 11, 12]
    assert [(there.tolist(), here.tolist()) for there, here in layout.extra_copies] == [([4, 5, 9], [0, 1, 5])]
    assert layout.query_lengths == [4, 1, 2, 3]
    assert layout.key_lengths == [4, 3, 2, 4]
    assert layout.query_starts.tolist() == [0, 4, 5, 7, 10]
    assert layout.key_starts.tolist() == [0, 4, 7, 9, 13]
    assert layout.query_starts.dtype == layout.key_starts.dtype == torch.int32


def test_layout_of_different_numbers_of_branches():
    # Example 1: branch 0 alone; example 2: trunk 1, branches 2 | 3 | 4.  Gather: 0 | 1 2 | 1 3 | 1 4
    layout = build_layout([0, 1], [[1], [1, 1, 1]])
    assert layout.key_index.tolist() == [0, 1, 2, 1, 3, 1, 4]
    assert layout.first_copy.tolist() == [0, 1, 2, 4, 6]
    assert [(there.tolist(), here.tolist()) for there, here in layout.extra_copies] == [([3], [1]), ([5], [1])]
    assert (layout.query_lengths, layout.key_lengths) == ([1, 2, 1, 1], [1, 2, 2, 2])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), fewest=st.integers(1, 4), more=st.integers(0, 3), num_examples=st.integers(1, 5))
def test_layout_covers_every_token_and_each_copy_once(data, fewest, more, num_examples):
    trunks = data.draw(st.lists(st.integers(0, 6), min_size=num_examples, max_size=num_examples))
    counts = st.lists(st.integers(1, 5), min_size=fewest, max_size=fewest + more)
    branches = [data.draw(counts) for _ in trunks]
    layout = build_layout(trunks, branches)
    num_tokens = sum(trunks) + sum(map(sum, branches))
    assert layout.key_index[layout.first_copy].tolist() == list(range(num_tokens))
    assert len(layout.extra_copies) == max(map(len, branches)) - 1
    for number, (there, here) in enumerate(layout.extra_copies, start=2):
        assert layout.key_index[there].tolist() == here.tolist()
        sharing = sum(trunk for trunk, parts in zip(trunks, branches, strict=True) if len(parts) >= number)
        assert len(set(here.tolist())) == len(here) == sharing
    places = torch.cat([layout.first_copy, *(there for there, _ in layout.extra_copies)])
    assert sorted(places.tolist()) == list(range(len(layout.key_index)))
    assert sum(layout.query_lengths) == num_tokens
    assert sum(layout.key_lengths) == len(layout.key_index)


@pytest.mark.parametrize("num_branches", [1, 2, 3, 4])
def test_an_empty_row_becomes_a_filler_of_weight_zero(num_branches):
    batch = collate([], num_branches)
    assert batch.input_ids.tolist() == [0] * (1 + num_branches)
    assert batch.weights.tolist() == [0.0]
    assert batch.indices.tolist() == [-1]
    assert batch.lengths.tolist() == [[1] * num_branches]
    assert filler(num_branches).index == -1


def test_collating_leaves_the_examples_as_they_were():
    source = example(0, [1, 2], [[3, 4], [5]])
    source.trunk.setflags(write=False)  # as memory-mapped rows are
    batch = collate([source], 2)
    batch.input_ids.zero_()
    assert source.trunk.tolist() == [1, 2]


def test_to_moves_everything_but_the_dataset_rows():
    batch = collate([example(3, [1, 2], [[3, 4], [5]])], 2)
    moved = batch.to(torch.device("meta"))
    tensors = [moved.input_ids, moved.position_ids, moved.sources, moved.targets, moved.lengths, moved.weights]
    tensors += [moved.layout.key_index, moved.layout.first_copy, moved.layout.query_starts, moved.layout.key_starts]
    tensors += itertools.chain.from_iterable(moved.layout.extra_copies)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.indices.tolist() == [3]
    assert moved.layout.key_lengths == batch.layout.key_lengths
