"""Fast access to tokenised rows: examples by index, lengths, digests.

Reads Arrow memory directly, a slice of the dataset at a time.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa

from notus.data.packing import Batch, Example, StepPlan, check_fits, collate, deal

_SLICE = 4096


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Some rows of a dataset, every column as one flat array.

    Attributes:
        trunk_ids, trunk_starts: token ids of the trunks, end to end, and where each row's begin: [rows + 1].
        branch_ids, branch_starts: those of the branches, K per row, and where each branch's begin.
        mask: bool, one for each of `branch_ids`.
        row_starts: the number of each row's first branch: [rows + 1].
    """

    trunk_ids: np.ndarray
    trunk_starts: np.ndarray
    branch_ids: np.ndarray
    branch_starts: np.ndarray
    mask: np.ndarray
    row_starts: np.ndarray


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
        self._known_digests: np.ndarray | None = None
        trunks, branches, learned, counts = [], [], [], []
        for part in self._slices():
            trunks.append(np.diff(part.trunk_starts))
            branches.append(np.diff(part.branch_starts))
            learned.append(_loss_tokens(part))
            counts.append(np.diff(part.row_starts))
        self.num_branches = int(counts[0][0])
        if any((count != self.num_branches).any() for count in counts):
            raise ValueError("the rows of the dataset differ in their number of completions")
        of_trunks = np.concatenate(trunks)
        of_branches = np.concatenate(branches).reshape(-1, self.num_branches).sum(axis=1)
        self.lengths = of_trunks + of_branches
        self.separate_lengths = self.num_branches * of_trunks + of_branches
        self.loss_tokens = np.concatenate(learned).reshape(-1, self.num_branches)

    def __len__(self) -> int:
        return len(self.lengths)

    def __call__(self, indices: np.ndarray) -> list[Example]:
        """The examples at these rows, in this order."""
        wanted = [int(index) for index in indices]
        return _examples(_read(self._data[wanted]), wanted)

    def _slices(self) -> Iterator[_Slice]:
        for start in range(0, len(self._data), _SLICE):
            yield _read(self._data[start : start + _SLICE])

    def digests(self) -> np.ndarray:
        """A content digest of every row (trunk, branches, masks): uint8 [n, 16]; computed once."""
        if self._known_digests is None:
            self._known_digests = np.concatenate([_digests(part) for part in self._slices()])
        return self._known_digests


def step_rows(rows: Rows, indices: np.ndarray, *, rank: int, world_size: int, tokens_per_row: int) -> Iterator[Batch]:
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
    """Measure the first epoch's plan, at most `max_steps` steps of it.

    Raises:
        ValueError: an example of the dataset, in whatever step, is longer than `tokens_per_row`.
    """
    check_fits(int(rows.lengths.max()), tokens_per_row)
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


def _read(table: pa.Table) -> _Slice:
    trunk_ids, trunk_starts = _flat(table.column("trunk"))
    branch_lists, row_starts = _flat_lists(table.column("branches"))
    mask_lists, _ = _flat_lists(table.column("loss_mask"))
    branch_ids, branch_starts = _flat(branch_lists)
    mask, mask_starts = _flat(mask_lists)
    assert np.array_equal(mask_starts, branch_starts)
    return _Slice(trunk_ids, trunk_starts, branch_ids, branch_starts, mask.astype(bool), row_starts)


def _flat_lists(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The inner array of a list column, and where each row's part of it starts: [n + 1]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    return array.flatten(), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _flat(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    values, starts = _flat_lists(column)
    return values.to_numpy(zero_copy_only=False), starts


def _examples(part: _Slice, indices: list[int]) -> list[Example]:
    """The slice's rows, which stand at `indices` of the dataset."""
    examples = []
    for number, index in enumerate(indices):
        first, last = part.row_starts[number : number + 2]
        spans = [slice(*part.branch_starts[branch : branch + 2]) for branch in range(first, last)]
        examples.append(
            Example(
                index=index,
                trunk=part.trunk_ids[slice(*part.trunk_starts[number : number + 2])],
                branches=tuple(part.branch_ids[span] for span in spans),
                loss_masks=tuple(part.mask[span] for span in spans),
            )
        )
    return examples


def _loss_tokens(part: _Slice) -> np.ndarray:
    """Learned tokens of every branch of the slice, as `collate` counts them."""
    total = np.concatenate([[0], np.cumsum(part.mask)])
    learned = np.diff(total[part.branch_starts])
    # the first token of a conversation has nothing before it to predict it
    headless = np.repeat(np.diff(part.trunk_starts) == 0, np.diff(part.row_starts))
    headless &= np.diff(part.branch_starts) > 0
    learned[headless] -= part.mask[part.branch_starts[:-1][headless]]
    return learned


def _digests(part: _Slice) -> np.ndarray:
    """uint8 [rows, 16]: BLAKE2b of each row's sizes, token ids and masks."""
    trunk_ids, branch_ids = (ids.astype("<i4").tobytes() for ids in (part.trunk_ids, part.branch_ids))
    mask, lengths = part.mask.tobytes(), np.diff(part.branch_starts)
    found = bytearray()
    for row in range(len(part.row_starts) - 1):
        first, last = part.row_starts[row : row + 2]
        trunk_start, trunk_end = part.trunk_starts[row : row + 2]
        start, end = part.branch_starts[first], part.branch_starts[last]
        sizes = np.asarray([last - first, trunk_end - trunk_start, *lengths[first:last]], dtype="<i8")
        digest = hashlib.blake2b(sizes.tobytes(), digest_size=16)
        digest.update(trunk_ids[4 * trunk_start : 4 * trunk_end])
        digest.update(branch_ids[4 * start : 4 * end])
        digest.update(mask[start:end])
        found += digest.digest()
    return np.frombuffer(bytes(found), dtype=np.uint8).reshape(-1, 16)
