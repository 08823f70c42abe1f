"""Rows read back as plain Python does, whatever the storage; lengths and digests."""

import datasets
import numpy as np
import pytest

from notus.data.batching import step_rows
from notus.data.dataset import PROVENANCE, TokenizedDataset, mismatched
from notus.data.packing import collate


def features(ids="int32", mask="int8", sequence=datasets.List):
    return datasets.Features(
        {
            "trunk": sequence(datasets.Value(ids)),
            "branches": sequence(sequence(datasets.Value(ids))),
            "loss_mask": sequence(sequence(datasets.Value(mask))),
        }
    )


def dataset(records, form=None):
    names = ("trunk", "branches", "loss_mask")
    columns = {name: [record[place] for record in records] for place, name in enumerate(names)}
    return datasets.Dataset.from_dict(columns, features=form or features())


def random_records(count, num_branches=2, seed=0):
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        branches = [rng.integers(3, 100, rng.integers(1, 7)).tolist() for _ in range(num_branches)]
        masks = [rng.integers(0, 2, len(branch)).tolist() for branch in branches]
        records.append((rng.integers(3, 100, rng.integers(0, 6)).tolist(), branches, masks))
    return records


def assert_same_reading(rows, source):
    records = source.to_list()
    order = np.random.default_rng(1).permutation(len(records))
    for example, index in zip(rows(order), order, strict=True):
        record = records[index]
        assert example.index == index
        assert example.trunk.tolist() == record["trunk"]
        assert [branch.tolist() for branch in example.branches] == record["branches"]
        assert [mask.tolist() for mask in example.loss_masks] == [list(map(bool, m)) for m in record["loss_mask"]]
        assert all(mask.dtype == bool for mask in example.loss_masks)


def assert_same_lengths(rows, source):
    def learned(record):
        skip = 0 if record["trunk"] else 1  # nothing predicts a conversation's first token
        return [sum(mask[skip:]) for mask in record["loss_mask"]]

    records = source.to_list()
    of_branches = [sum(len(branch) for branch in record["branches"]) for record in records]
    trunks = [len(record["trunk"]) for record in records]
    copies = rows.num_branches
    assert rows.lengths.tolist() == [trunk + rest for trunk, rest in zip(trunks, of_branches, strict=True)]
    assert rows.separate_lengths(np.arange(len(rows))).tolist() == [
        copies * trunk + rest for trunk, rest in zip(trunks, of_branches, strict=True)
    ]
    assert rows.loss_tokens.tolist() == [learned(record) for record in records]
    assert len(rows) == len(records)


def select_some(source):
    return source.select([9, 3, 3, 20, 0, 14])


def concatenate(source):
    parts = [source.select(range(start, min(start + 5, len(source)))) for start in range(0, len(source), 5)]
    return datasets.concatenate_datasets([part.flatten_indices() for part in parts])


@pytest.mark.parametrize("num_branches", [1, 2, 4])
@pytest.mark.parametrize(
    "arrange",
    [
        lambda source: source,
        select_some,
        lambda source: source.shuffle(seed=3),
        lambda source: source.filter(lambda row: len(row["trunk"]) != 2),
        lambda source: source.select(range(4, 19)),
        concatenate,
        lambda source: concatenate(source).shuffle(seed=3).select(range(2, 17)),
        lambda source: source.add_column("extra", ["x"] * len(source)),
    ],
    ids=["whole", "select", "shuffle", "filter", "range", "chunks", "chunks-shuffled", "more-columns"],
)
def test_rows_read_as_plain_python_does(arrange, num_branches):
    source = arrange(dataset(random_records(23, num_branches)))
    rows = TokenizedDataset(source)
    assert rows.num_branches == num_branches
    assert_same_reading(rows, source)
    assert_same_lengths(rows, source)


def test_an_empty_dataset_and_a_row_without_branches_are_refused():
    with pytest.raises(ValueError, match="holds no rows"):
        TokenizedDataset(dataset([]))
    with pytest.raises(ValueError, match="row 3 of the dataset has no completion"):
        TokenizedDataset(dataset([*random_records(2), ([1], [], [])]))


# --- rows of different K ---


def mixed_records(count=23, seed=0):
    rng = np.random.default_rng(seed)
    return [random_records(1, int(rng.integers(1, 5)), seed=number)[0] for number in range(count)]


def test_a_completion_that_is_missing_has_no_tokens():
    rows = TokenizedDataset(dataset([([1, 2], [[3, 4], [5]], [[1, 0], [1]]), ([6], [[7, 8, 9]], [[1, 1, 1]])]))
    assert rows.num_branches == 2
    assert rows.branch_counts.tolist() == [2, 1]
    assert rows.branch_lengths.tolist() == [[2, 1], [3, 0]]
    assert rows.loss_tokens.tolist() == [[1, 1], [3, 0]]
    assert rows.lengths.tolist() == [5, 4]
    assert rows.separate_lengths(np.arange(2)).tolist() == [7, 4]
    assert rows.longest_sequence == 4
    assert [len(example.branches) for example in rows(np.array([1, 0]))] == [1, 2]
    assert rows.info(1).cut == (0, 0)


@pytest.mark.parametrize(
    "arrange",
    [lambda source: source, select_some, concatenate, lambda source: concatenate(source).shuffle(seed=3)],
    ids=["whole", "select", "chunks", "chunks-shuffled"],
)
def test_rows_of_different_k_read_as_plain_python_does(arrange):
    source = arrange(dataset(mixed_records()))
    rows, records = TokenizedDataset(source), source.to_list()
    assert_same_reading(rows, source)
    most = max(len(record["branches"]) for record in records)
    assert rows.num_branches == most
    for index, record in enumerate(records):
        branches, skip = record["branches"], 0 if record["trunk"] else 1
        missing = [0] * (most - len(branches))
        assert rows.branch_lengths[index].tolist() == [*map(len, branches), *missing]
        assert rows.loss_tokens[index].tolist() == [*(sum(mask[skip:]) for mask in record["loss_mask"]), *missing]
        assert rows.lengths[index] == len(record["trunk"]) + sum(map(len, branches))


def test_the_longest_list_of_a_selection_decides_k():
    source = dataset([*random_records(3, 2), *random_records(1, 4)])
    assert TokenizedDataset(source).num_branches == 4
    assert TokenizedDataset(source.select([0, 2])).num_branches == 2


def test_ratings_and_labels_follow_the_rows():
    columns = {
        "source": [None] * 3,
        "ratings": [[5.0, 3.5], None, [4.0, None, 1.0]],
        "label": [True, False, True],
    }
    records = [random_records(1, number)[0] for number in (2, 3, 3)]
    told = datasets.Dataset.from_dict(columns, features=PROVENANCE)
    rows = TokenizedDataset(datasets.concatenate_datasets([dataset(records), told], axis=1).select([2, 0, 1, 0]))
    assert rows.ratings.dtype == np.float32
    nan = np.nan
    np.testing.assert_array_equal(rows.ratings, [[4, nan, 1], [5, 3.5, nan], [nan] * 3, [5, 3.5, nan]])
    assert rows.labels.dtype == bool
    assert rows.labels.tolist() == [True, True, False, True]
    assert (rows.info(0).ratings, rows.info(2).ratings, rows.info(2).label) == ((4, None, 1), None, False)


def test_labels_that_some_rows_lack_are_none():
    columns = {"source": [None] * 2, "ratings": [None] * 2, "label": [True, None]}
    told = datasets.Dataset.from_dict(columns, features=PROVENANCE)
    assert TokenizedDataset(datasets.concatenate_datasets([dataset(random_records(2, 1)), told], axis=1)).labels is None


# --- provenance ---


def with_provenance(source):
    """`source`, whose rows 0, 3, 6 ... are of "a", 1, 4, ... of "b", the rest of nothing; rated row number, 0."""
    count = len(source)
    columns = {
        "source": ["a", "b", None] * (count // 3),
        "ratings": [[number, [None, 0.0][number % 2]] for number in range(count)],
        "label": [None] * count,
    }
    told = datasets.Dataset.from_dict(columns, features=PROVENANCE)
    return datasets.concatenate_datasets([source, told], axis=1)


@pytest.mark.parametrize("arrange", [lambda source: source, concatenate], ids=["whole", "chunks"])
def test_provenance_follows_the_rows(arrange):
    source = arrange(with_provenance(dataset(random_records(24))))
    rows = TokenizedDataset(source.select([7, 7, 0, 23]))
    assert rows.sources == ["b", "b", "a", TokenizedDataset.UNKNOWN_SOURCE]
    assert rows.ratings.dtype == np.float32
    np.testing.assert_array_equal(rows.ratings, [[7, 0], [7, 0], [0, np.nan], [23, 0]])


def test_provenance_that_nobody_gave_is_none():
    bare = dataset(random_records(2))
    told = datasets.Dataset.from_dict({name: [None, None] for name in PROVENANCE}, features=PROVENANCE)
    for rows in (TokenizedDataset(bare), TokenizedDataset(datasets.concatenate_datasets([bare, told], axis=1))):
        assert rows.sources is None
        assert rows.ratings is None


def test_provenance_is_no_part_of_the_digests():
    bare = dataset(random_records(24))
    assert digests(with_provenance(bare)) == digests(bare)


# --- digests ---


def digests(source):
    found = TokenizedDataset(source).digests()
    assert found.shape == (len(source), 16)
    assert found.dtype == np.uint8
    return [row.tobytes() for row in found]


def test_digests_do_not_depend_on_chunks_order_or_storage(tmp_path):
    records = random_records(23)
    source = dataset(records)
    expected = digests(source)
    assert digests(concatenate(source)) == expected
    order = np.random.default_rng(0).permutation(23)
    assert digests(source.select(order)) == [expected[index] for index in order]
    source.save_to_disk(tmp_path / "saved")
    assert digests(datasets.load_from_disk(str(tmp_path / "saved"))) == expected
    for form in (
        features("int64"),
        features(mask="bool"),
        features(mask="int32"),
        features(sequence=datasets.LargeList),
    ):
        assert digests(dataset(records, form)) == expected


def test_digests_change_with_every_token_mask_and_boundary():
    base = ([1, 2], [[3, 4], [5]], [[1, 0], [1]])
    variants = [
        base,
        ([1, 9], [[3, 4], [5]], [[1, 0], [1]]),
        ([1, 2], [[3, 9], [5]], [[1, 0], [1]]),
        ([1, 2], [[3, 4], [9]], [[1, 0], [1]]),
        ([1, 2], [[3, 4], [5]], [[0, 0], [1]]),
        ([1, 2], [[3, 4], [5]], [[1, 1], [1]]),
        ([1, 2], [[3, 4], [5]], [[1, 0], [0]]),
        # the same tokens and masks, cut elsewhere
        ([1], [[2, 3, 4], [5]], [[1, 0, 1], [1]]),
        ([1, 2], [[3], [4, 5]], [[1], [0, 1]]),
        ([1, 2], [[5], [3, 4]], [[1], [1, 0]]),
    ]
    found = digests(dataset(variants))
    assert len(set(found)) == len(variants)
    assert digests(dataset([base, base])) == [found[0]] * 2


def test_digests_are_those_of_earlier_versions():
    # reference caches are keyed by them
    pair = ([1, 2], [[3, 4], [5]], [[1, 0], [1]])
    assert digests(dataset([pair]))[0].hex() == "70f3f95239b725aee5691684e69988bf"
    assert digests(dataset([([], [[3, 4, 5]], [[0, 1, 1]])]))[0].hex() == "7d83fa47c6bd91438814c6b707f55ff8"


def test_three_branches_are_not_two():
    (two,), (three,) = (
        digests(dataset([([1], [[2], [3]], [[1], [1]])])),
        digests(dataset([([1], [[2], [3], []], [[1], [1], []])])),
    )
    assert two != three


def test_examples_are_views_of_the_file(tmp_path):
    dataset(random_records(23)).save_to_disk(tmp_path)
    rows = TokenizedDataset(datasets.load_from_disk(str(tmp_path)))
    first, again = (rows(np.array([5]))[0] for _ in range(2))
    assert len(first.branches[0])
    assert np.shares_memory(first.branches[0], again.branches[0])
    assert not first.branches[0].flags.writeable


# --- mismatched rows ---


def demonstrations(*rows):
    """A dataset of one completion a row: (trunk, branch), all of the branch learned."""
    return TokenizedDataset(dataset([(trunk, [branch], [[1] * len(branch)]) for trunk, branch in rows]))


def joined(rows):
    return [(example.trunk.tolist(), example.branches[0].tolist()) for example in rows(np.arange(len(rows)))]


def test_mismatched_takes_the_next_completion_of_another_prompt():
    rows = demonstrations(([1], [10]), ([1], [11, 11]), ([2], [20]), ([3, 3], [30, 31, 32]), ([2], [21]))
    found = mismatched(rows, 64)
    # the two of prompt 1 take the only one of the next prompt; the last takes the first of all
    expected = [([1], [20]), ([1], [20]), ([2], [30, 31, 32]), ([3, 3], [21]), ([2], [10])]
    assert joined(found) == expected
    assert (found.num_branches, len(found)) == (1, 5)
    assert found.lengths.tolist() == [2, 2, 4, 3, 2]
    assert found.trunk_lengths.tolist() == [1, 1, 1, 2, 1]
    assert found.branch_lengths.tolist() == found.loss_tokens.tolist() == [[1], [1], [3], [1], [1]]
    assert found.separate_lengths(np.arange(5)).tolist() == found.lengths.tolist()
    assert [example.index for example in found(np.array([3, 0]))] == [3, 0]


def test_mismatched_completions_of_pairs_are_good_and_bad_as_the_rows_are():
    # a good and a bad answer of each prompt, as a pair becomes under a loss of labels; the last prompt has three
    rows = demonstrations(
        ([1], [10]), ([1], [11]), ([2], [20]), ([2], [21]), ([3], [30]), ([3], [31]), ([3], [32])
    )  # fmt: skip
    answers = [answer[0] for _, answer in joined(mismatched(rows, 64))]
    assert answers == [20, 21, 30, 31, 10, 11, 10]


def test_mismatched_past_the_end_skips_a_beginning_of_the_same_prompt():
    found = mismatched(demonstrations(([1], [10]), ([2], [20]), ([1], [11]), ([1], [12])), 64)
    assert joined(found) == [([1], [20]), ([2], [11]), ([1], [20]), ([1], [20])]


def test_mismatched_cuts_the_completion_at_its_end_and_counts_what_is_left():
    source = dataset([([1, 2, 3], [[9]], [[1]]), ([4], [[5, 6, 7, 8]], [[1, 0, 1, 1]]), ([], [[7, 7]], [[0, 1]])])
    found = mismatched(TokenizedDataset(source), 6)
    assert joined(found) == [([1, 2, 3], [5, 6, 7]), ([4], [7, 7]), ([], [9])]
    # nothing stands before the only token of the last; behind a prompt the mask's zeros are not learned either
    assert found.loss_tokens.tolist() == [[2], [1], [0]]
    batch = collate(found(np.arange(3)), 1)
    assert batch.lengths.tolist() == found.loss_tokens.tolist()
    assert mismatched(TokenizedDataset(source), 4).branch_lengths.tolist() == [[1], [2], [1]]


def test_mismatched_rows_of_a_selection_are_those_of_its_order():
    rows = demonstrations(([1], [10]), ([2], [20]), ([3], [30]))
    found = mismatched(TokenizedDataset(demonstrations_of(rows).select([2, 0, 0, 1])), 64)
    assert joined(found) == [([3], [10]), ([1], [20]), ([1], [20]), ([2], [30])]


def demonstrations_of(rows):
    return dataset([(example.trunk.tolist(), [example.branches[0].tolist()], [[1] * len(example.branches[0])])
                    for example in rows(np.arange(len(rows)))])  # fmt: skip


def test_mismatched_digests_are_those_of_the_joined_tokens():
    rows = demonstrations(([1], [10, 11, 12]), ([2, 2], [20]), ([3], [30]))
    found = mismatched(rows, 4)
    stored = demonstrations(*joined(found))
    assert np.array_equal(found.digests(), stored.digests())
    assert not (found.digests() == rows.digests()).all(axis=1).any()
    assert found.longest_sequence == 4
    assert found.first_beyond(31) is None
    assert found.first_beyond(30) == (1, 30)


def test_mismatched_needs_another_prompt_and_room_for_a_completion():
    with pytest.raises(ValueError, match="all rows have the same prompt"):
        mismatched(demonstrations(([1], [10]), ([1], [11])), 64)
    with pytest.raises(ValueError, match=r"row 2: the prompt of 3 tokens leaves no room.*within 3 tokens"):
        mismatched(demonstrations(([1], [10]), ([2, 2, 2], [11])), 3)


def test_mismatched_rows_are_packed_and_dealt_as_others():
    rows = demonstrations(*(([number] * (1 + number % 3), [50 + number] * (1 + number % 4)) for number in range(1, 12)))
    found, seen = mismatched(rows, 64), []
    for rank in range(2):
        for batch in step_rows(found, np.arange(len(found)), rank=rank, world_size=2, tokens_per_row=16):
            seen += [index for index in batch.indices.tolist() if index >= 0]
    assert sorted(seen) == list(range(11))
