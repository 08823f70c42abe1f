"""Which examples an optimizer step sees, and on which rank and in which packed row each is computed.

The step plan depends on the data, the batch size and the seed, never on the number of ranks. Within a step, every rank
gets the same number of packed rows, and each row holds at most `tokens_per_row` tokens.

Sharded ranks meet in collectives during every row, so row r takes as long as the rank with the heaviest row r. What is
balanced is the sum over rows of the heaviest rank's cost.
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from notus.data.packing import Batch, check_fits, collate

if TYPE_CHECKING:  # balancing needs no `datasets`
    from notus.data.dataset import TokenizedDataset

Balanced = list[list[list[int]]]


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Step s takes the next `batch_size` examples of its epoch's seeded permutation.

    An epoch's last step may be short.
    """

    num_examples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_examples / self.batch_size)

    def indices(self, step: int) -> np.ndarray:
        """Dataset rows of step `step` (counted from 0 over all epochs), int64 [<= batch_size]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.batch_size
        if not self.shuffle:
            return np.arange(first, min(first + self.batch_size, self.num_examples))
        return _permutation(self.num_examples, self.seed, epoch)[first : first + self.batch_size]


@functools.lru_cache(maxsize=2)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def balance(lengths: Sequence[int], costs: Sequence[float], world_size: int, tokens_per_row: int) -> Balanced:
    """Balance a step's examples over ranks and packed rows.

    Examples are taken by falling cost, and each goes to the cheapest row so far that has room for it. Then the rows are
    sorted by cost, so that row r costs about the same on every rank. Every rank gets the same number of rows, the
    smallest that was found to be enough. A row may be empty.

    Args:
        lengths: tokens of each example of the step (trunk and branches together).
        costs: what each example takes to compute, in any unit.
        world_size: number of ranks.
        tokens_per_row: the most tokens a row may hold.

    Returns:
        `rows[rank][row]`: positions into `lengths`.

    Raises:
        ValueError: an example is longer than `tokens_per_row`.
    """
    check_fits(int(max(lengths)), tokens_per_row)
    lengths, costs = [int(length) for length in lengths], [float(cost) for cost in costs]
    # The costliest first: what comes late is small and fills the gaps (longest processing time first, Graham 1969).
    order = sorted(range(len(lengths)), key=lambda item: (-costs[item], -lengths[item], item))
    # The tokens alone need this many rows per rank; examples that fit badly together may need more.
    fewest = max(1, math.ceil(sum(lengths) / (world_size * tokens_per_row)))
    tries = (_spread(lengths, costs, order, count * world_size, tokens_per_row) for count in _counts(fewest))
    bins = next(found for found in tries if found is not None)
    # Neighbours in this order cost about the same: they become the same row of different ranks.
    bins.sort(key=lambda row: -_total(costs, row))
    return [bins[rank::world_size] for rank in range(world_size)]


def lockstep_cost(balanced: Balanced, costs: Sequence[float]) -> float:
    """The cost of a step for ranks in lock-step: the sum over rows of the heaviest rank's."""
    return sum(max(_total(costs, row) for row in rows) for rows in zip(*balanced, strict=True))


def _counts(fewest: int) -> Iterator[int]:
    """Yield the numbers of rows per rank to try: `fewest` and the next, then in steps that double."""
    yield fewest
    for power in itertools.count():
        yield fewest + 2**power


def _total(costs: Sequence[float], row: Sequence[int]) -> float:
    return sum(costs[item] for item in row)


def _spread(
    lengths: Sequence[int], costs: Sequence[float], order: Sequence[int], num_bins: int, room: int
) -> list[list[int]] | None:
    """Put the items of `order` one by one into the cheapest bin so far that has room; None if none has any."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    left = [room] * num_bins
    heap = [(0.0, number) for number in range(num_bins)]
    for item in order:
        full = []  # cheaper bins without room for this item; a smaller one may still fit
        while heap and left[heap[0][1]] < lengths[item]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, number = heap[0]
        bins[number].append(item)
        left[number] -= lengths[item]
        heapq.heapreplace(heap, (cost + costs[item], number))
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def packed(rows: "TokenizedDataset", indices: np.ndarray, balanced: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Yield a rank's packed rows of a step. `balanced` says which of the step's `indices` each holds; see `balance`."""
    for row in balanced:
        yield collate(rows(indices[row]), rows.num_branches)


def step_rows(
    rows: "TokenizedDataset",
    indices: np.ndarray,
    *,
    rank: int,
    world_size: int,
    tokens_per_row: int,
    costs: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yield this rank's packed rows of one step.

    Args:
        rows: the tokenised dataset.
        indices: dataset rows of the step.
        rank, world_size: which share of the step to take.
        tokens_per_row: the most tokens a row may hold.
        costs: what each of the step's examples takes to compute, in any unit; None: as many as its tokens.
    """
    lengths = rows.lengths[indices]
    balanced = balance(lengths.tolist(), (lengths if costs is None else costs).tolist(), world_size, tokens_per_row)
    return packed(rows, indices, balanced[rank])


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """What packing, sharing and balancing do to a step plan.

    Attributes:
        steps: optimizer steps looked at.
        padding_share: share of processed tokens that carry nothing (fillers of empty rows).
        sharing_gain: tokens with a trunk per branch, over tokens with one trunk per example.
        idle_share: share of the steps for which the mean rank waits for a heavier one, by cost.
        ranks: how many share a step.
    """

    steps: int
    padding_share: float
    sharing_gain: float
    idle_share: float
    ranks: int = 1

    def __str__(self) -> str:
        found = f"packing: {self.padding_share:.2%} padding"
        if self.sharing_gain > 1:
            found += f", {1 - 1 / self.sharing_gain:.0%} fewer tokens because prompts are shared"
        if self.ranks > 1:
            found += f", ranks wait for the slowest one for {self.idle_share:.2%} of a step"
        return f"{found} (over the first {self.steps} steps)"


def packing_report(
    rows: "TokenizedDataset",
    plan: StepPlan,
    costs: np.ndarray,
    *,
    world_size: int,
    tokens_per_row: int,
    max_steps: int = 200,
) -> PackingReport:
    """Measure the first epoch's plan, at most `max_steps` steps of it; `costs` [n]: what each row takes to compute.

    Raises:
        ValueError: an example of the dataset, in whatever step, is longer than `tokens_per_row`.
    """
    check_fits(int(rows.lengths.max()), tokens_per_row)
    steps = min(plan.steps_per_epoch, max_steps)
    empty, packed, separate, cost, paid = 0, 0, 0, 0.0, 0.0
    for step in range(steps):
        indices = plan.indices(step)
        of_step = costs[indices].tolist()
        ranks = balance(rows.lengths[indices].tolist(), of_step, world_size, tokens_per_row)
        empty += sum(1 + rows.num_branches for rank in ranks for row in rank if not row)
        cost += sum(of_step)
        paid += world_size * lockstep_cost(ranks, of_step)
        packed += int(rows.lengths[indices].sum())
        separate += int(rows.separate_lengths(indices).sum())
    return PackingReport(steps, empty / (packed + empty), separate / packed, 1 - cost / paid, world_size)
