"""Fast access to tokenised rows: examples by index, lengths, digests. Reads Arrow memory directly, bounded by a slice."""

import dataclasses
import hashlib
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa

from notus.data.packing import Batch, Example, StepPlan, collate, deal

_SLICE = 4096


class Rows:
    """A tokenised dataset (columns `trunk`, `branches`, `loss_mask`) as examples.

    Attributes:
        num_branches: K, the same for every row.
        lengths: int64 [n], tokens of each example, trunk and branches together.
        separate_lengths: int64 [n], tokens if each branch carried its own copy of the trunk.
        loss_tokens: int64 [n, K], tokens of each branch that the loss sees.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        """Scan the lengths once.

        Raises:
            ValueError: the dataset is empty or its rows differ in the number of branches.
        """
        if len(dataset) == 0:
            raise ValueError("the tokenised dataset holds no rows")
        self._data = dataset.select_columns(["trunk", "branches", "loss_mask"]).with_format("arrow")
        trunks, branches, learned = [], [], []
        for example in self._scan():
            trunks.append(len(example.trunk))
            branches.append([len(branch) for branch in example.branches])
            # the first token of a conversation has nothing before it to predict it
            learned.append([int(m.sum() - (m[0] if not len(example.trunk) and len(m) else 0)) for m in example.loss_masks])
        if len({len(row) for row in branches}) != 1:
            raise ValueError("the rows of the dataset differ in their number of completions")
        self.num_branches = len(branches[0])
        of_branches = np.asarray(branches, dtype=np.int64).sum(axis=1)
        self.lengths = np.asarray(trunks, dtype=np.int64) + of_branches
        self.separate_lengths = self.num_branches * np.asarray(trunks, dtype=np.int64) + of_branches
        self.loss_tokens = np.asarray(learned, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __call__(self, indices: np.ndarray) -> list[Example]:
        """The examples at these rows, in this order."""
        return list(_examples(self._data[[int(index) for index in indices]], [int(index) for index in indices]))

    def _scan(self) -> Iterator[Example]:
        for start in range(0, len(self._data), _SLICE):
            table = self._data[start : start + _SLICE]
            yield from _examples(table, range(start, start + table.num_rows))

    def digests(self) -> np.ndarray:
        """A content digest of every row (trunk, branches, masks): uint8 [n, 16]."""
        found = [np.frombuffer(_digest(example), dtype=np.uint8) for example in self._scan()]
        return np.stack(found)


def step_rows(
    rows: Rows, indices: np.ndarray, *, rank: int, world_size: int, tokens_per_row: int
) -> Iterator[Batch]:
    """This rank's packed rows of one step.

    Args:
        rows: the tokenised dataset.
        indices: dataset rows of the step.
        rank, world_size: which share of the step to take.
        tokens_per_row: the most tokens a row may hold.
    """
    for row in deal(rows.lengths[indices].tolist(), world_size, tokens_per_row)[rank]:
        yield collate(rows(indices[row]), rows.num_branches)


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """What packing, sharing and dealing do to a step plan.

    Attributes:
        steps: optimizer steps looked at.
        padding_share: share of processed tokens that carry nothing (fillers of empty rows).
        sharing_gain: tokens with a trunk per branch, over tokens with one trunk per example.
        imbalance: mean over steps of (heaviest rank's tokens / mean rank's tokens - 1).
    """

    steps: int
    padding_share: float
    sharing_gain: float
    imbalance: float

    def __str__(self) -> str:
        return (
            f"packing: padding {self.padding_share:.2%}, sharing gain {self.sharing_gain:.2f}x, "
            f"rank imbalance {self.imbalance:.2%} (over {self.steps} steps)"
        )


def packing_report(
    rows: Rows, plan: StepPlan, *, world_size: int, tokens_per_row: int, max_steps: int = 200
) -> PackingReport:
    """Measure the first epoch's plan, at most `max_steps` steps of it."""
    steps = min(plan.steps_per_epoch, max_steps)
    empty, packed, separate, excess = 0, 0, 0, 0.0
    for step in range(steps):
        indices = plan.indices(step)
        lengths = rows.lengths[indices]
        ranks = deal(lengths.tolist(), world_size, tokens_per_row)
        empty += sum(1 + rows.num_branches for rank in ranks for row in rank if not row)
        loads = [sum(int(lengths[item]) for row in rank for item in row) for rank in ranks]
        excess += max(loads) * world_size / sum(loads) - 1
        packed += int(lengths.sum())
        separate += int(rows.separate_lengths[indices].sum())
    return PackingReport(steps, empty / (packed + empty), separate / packed, excess / steps)


def _digest(example: Example) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    sizes = [len(example.trunk), *(len(branch) for branch in example.branches)]
    digest.update(np.asarray([len(example.branches), *sizes], dtype="<i8").tobytes())
    for ids in (example.trunk, *example.branches):
        digest.update(ids.astype("<i4").tobytes())
    for mask in example.loss_masks:
        digest.update(mask.astype("u1").tobytes())
    return digest.digest()


def _examples(table: pa.Table, indices: range | list[int]) -> Iterator[Example]:
    trunk_ids, trunk_at = _flat(table.column("trunk"))
    branch_lists, branches_at = _flat_lists(table.column("branches"))
    mask_lists, _ = _flat_lists(table.column("loss_mask"))
    branch_ids, ids_at = _flat(branch_lists)
    mask_values, _ = _flat(mask_lists)
    mask_values = mask_values.astype(bool)
    for number, index in enumerate(indices):
        spans = [slice(ids_at[k], ids_at[k + 1]) for k in range(branches_at[number], branches_at[number + 1])]
        yield Example(
            index=index,
            trunk=trunk_ids[trunk_at[number] : trunk_at[number + 1]],
            branches=tuple(branch_ids[span] for span in spans),
            loss_masks=tuple(mask_values[span] for span in spans),
        )


def _flat_lists(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The inner array of a list column, and where each row's part of it starts: [n + 1]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    return array.flatten(), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _flat(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    values, starts = _flat_lists(column)
    return values.to_numpy(zero_copy_only=False), starts
