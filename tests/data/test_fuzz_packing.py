"""Step plans, dealing and packing, over rows, budgets and ranks of every size: all tokens, each once."""

from itertools import chain
from typing import Any

import datasets
import numpy as np
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from notus.data.batching import StepPlan, packing_report, step_rows
from notus.data.dataset import FEATURES, TokenizedDataset
from notus.data.packing import Batch

tokens = st.lists(st.integers(0, 399), max_size=12)


@st.composite
def branches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    ids = draw(st.lists(st.integers(0, 399), min_size=1, max_size=9))
    mask = draw(st.lists(st.sampled_from([0, 1, 1]), min_size=len(ids), max_size=len(ids)))
    return ids, mask


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of up to four branches, the same number in all of them or not."""
    fewest, most = sorted([draw(st.integers(1, 4)), draw(st.integers(1, 4))])
    found = []
    for _ in range(draw(st.integers(1, 24))):
        drawn = [draw(branches()) for _ in range(draw(st.integers(fewest, most)))]
        found.append(
            {"trunk": draw(tokens), "branches": [ids for ids, _ in drawn], "loss_mask": [mask for _, mask in drawn]}
        )
    return found


def as_rows(table: list[dict[str, Any]]) -> TokenizedDataset:
    return TokenizedDataset(datasets.Dataset.from_list(table, features=FEATURES))


def whole(row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What a batch should hold of a row: its tokens, and per branch (tokens before it, target) of what is learned."""
    learned = []
    for ids, mask in zip(row["branches"], row["loss_mask"], strict=True):
        sequence = row["trunk"] + ids
        at = [len(row["trunk"]) + i for i, bit in enumerate(mask) if bit]
        learned.append([(tuple(sequence[:place]), sequence[place]) for place in at if place > 0])
    return row["trunk"] + list(chain(*row["branches"])), learned


def unpacked(batch: Batch, table: list[dict[str, Any]]) -> dict[int, tuple[list[Any], list[Any]]]:
    """The same, read out of a batch: sequences by following the attention layout from each predicting position."""
    found, row_at, segment, learned_at = {}, 0, 0, 0
    key_starts = batch.layout.key_starts.tolist()
    query_starts = batch.layout.query_starts.tolist()
    columns = zip(batch.indices.tolist(), batch.lengths.tolist(), batch.present.tolist(), strict=True)
    for index, lengths, present in columns:
        begin, learned = row_at, []
        num_branches = len(table[index]["branches"]) if index >= 0 else len(lengths)
        assert present == [number < num_branches for number in range(len(lengths))]
        assert not any(lengths[num_branches:])
        for count in lengths[:num_branches]:
            keys = batch.layout.key_index[key_starts[segment] : key_starts[segment + 1]].tolist()
            sequence = batch.input_ids[keys].tolist()
            assert batch.position_ids[keys].tolist() == list(range(len(keys)))
            row_at = query_starts[segment + 1]
            part = slice(learned_at, learned_at + count)
            sources, targets = batch.sources[part].tolist(), batch.targets[part].tolist()
            seen = [tuple(sequence[: keys.index(source) + 1]) for source in sources]
            learned.append(list(zip(seen, targets, strict=True)))
            segment, learned_at = segment + 1, learned_at + count
        if index >= 0:
            assert index not in found
            found[index] = (batch.input_ids[begin:row_at].tolist(), learned)
    assert row_at == len(batch.input_ids)
    assert learned_at == len(batch.targets)
    return found


@fuzz(60)
@given(tables(), st.integers(1, 30), st.integers(1, 9), st.integers(0, 60), st.integers(0, 2**31), st.booleans())
def test_an_epoch_sees_every_token_once_whatever_the_ranks(
    table: list[dict[str, Any]], batch_size: int, world_size: int, room: int, seed: int, shuffle: bool
) -> None:
    rows = as_rows(table)
    plan = StepPlan(len(rows), batch_size, seed=seed, shuffle=shuffle)
    tokens_per_row = int(rows.lengths.max()) + room
    seen: dict[int, Any] = {}
    for step in range(plan.steps_per_epoch):
        indices = plan.indices(step)
        per_rank = [
            list(step_rows(rows, indices, rank=rank, world_size=world_size, tokens_per_row=tokens_per_row))
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in per_rank}) == 1  # or the ranks' collectives would not meet
        of_step: dict[int, Any] = {}
        for batch in (batch for batches in per_rank for batch in batches):
            found = unpacked(batch, table)
            assert len(batch.input_ids) <= tokens_per_row or not found
            assert batch.weights.tolist() == [float(index >= 0) for index in batch.indices.tolist()]
            assert not found.keys() & of_step.keys()
            of_step.update(found)
        assert sorted(of_step) == sorted(indices.tolist())
        assert not of_step.keys() & seen.keys()
        seen.update(of_step)
    assert seen == {index: whole(row) for index, row in enumerate(table)}


@fuzz(30)
@given(tables(), st.integers(1, 30), st.integers(1, 9), st.integers(0, 60))
def test_what_the_rows_say_of_themselves_is_so(
    table: list[dict[str, Any]], batch_size: int, world_size: int, room: int
) -> None:
    rows = as_rows(table)
    expected = [whole(row) for row in table]
    assert rows.lengths.tolist() == [len(ids) for ids, _ in expected]
    most = max(len(learned) for _, learned in expected)
    assert rows.num_branches == most
    assert rows.loss_tokens.tolist() == [
        [*(len(branch) for branch in learned), *[0] * (most - len(learned))] for _, learned in expected
    ]
    copies = [(len(row["branches"]) - 1) * len(row["trunk"]) for row in table]
    assert (rows.separate_lengths(np.arange(len(rows))) - rows.lengths).tolist() == copies
    alike = [[row == other for other in table] for row in table]
    digests = rows.digests()
    assert [[bytes(a) == bytes(b) for b in digests] for a in digests] == alike
    report = packing_report(
        rows,
        StepPlan(len(rows), batch_size),
        rows.lengths,
        world_size=world_size,
        tokens_per_row=int(rows.lengths.max()) + room,
    )
    assert 0 <= report.padding_share < 1
    assert 1 <= report.sharing_gain <= rows.num_branches
    assert 0 <= report.idle_share <= 1 - 1 / world_size + 1e-9
