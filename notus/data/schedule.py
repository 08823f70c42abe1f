"""A step's examples to ranks and rows, so that the ranks wait for each other as little as may be.

Sharded ranks meet in collectives during every row, so row r takes as long as the rank with the heaviest row r:
what is balanced is the sum over rows of the heaviest rank's cost.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence

from notus.data.packing import check_fits

Dealt = list[list[list[int]]]


def deal(lengths: Sequence[int], costs: Sequence[float], world_size: int, tokens_per_row: int) -> Dealt:
    """Deal a step's examples to ranks and rows.

    The dearest example first, each to the cheapest row that has room for it; then rows of like cost get the same
    number on different ranks, the dearest rows the first. Every rank gets the same number of rows, the smallest that
    was found to do; a row may be empty.

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
    order = sorted(range(len(lengths)), key=lambda item: (-costs[item], -lengths[item], item))
    fewest = max(1, math.ceil(sum(lengths) / (world_size * tokens_per_row)))
    tries = (_spread(lengths, costs, order, count * world_size, tokens_per_row) for count in _counts(fewest))
    bins = next(found for found in tries if found is not None)
    bins.sort(key=lambda row: -_total(costs, row))
    return [bins[rank::world_size] for rank in range(world_size)]


def time_of(dealt: Dealt, costs: Sequence[float]) -> float:
    """The cost that ranks in lock-step take: over all rows, the heaviest rank's."""
    return sum(max(_total(costs, row) for row in rows) for rows in zip(*dealt, strict=True))


def _counts(fewest: int) -> Iterator[int]:
    """Numbers of rows to try: one by one where one more tells, in larger steps from there."""
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
        full = []
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
