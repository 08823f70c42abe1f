"""What feeds the forward passes: packed rows, dealt by cost and made before they are needed."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from notus.data.dataset import Rows
from notus.data.packing import Batch
from notus.data.prefetch import Prefetch
from notus.data.schedule import StepPlan, deal, packed, time_of
from notus.model.flops import dimensions, forward_flops
from notus.model.policy import Policy
from notus.runtime.distributed import rank, world_size

T = TypeVar("T")


def row_costs(policy: Policy, rows: Rows, indices: np.ndarray | None = None) -> np.ndarray:
    """What the policy computes for each example: necessary operations of a forward pass, int64 [n].

    Args:
        policy: sharded or not.
        rows: the tokenised dataset.
        indices: int64 [n], which rows; None: all.
    """
    chosen = slice(None) if indices is None else indices
    return forward_flops(
        dimensions(policy.causal_lm),
        rows.trunk_lengths[chosen],
        rows.branch_lengths[chosen],
        rows.loss_tokens[chosen].sum(axis=1),
    )


def prefetched(batches: Iterator[T], device: torch.device) -> Prefetch[T]:
    """Batches, or what else comes between them, made ahead on a thread; on the host, ready to be copied to `device`."""
    if device.type != "cuda":
        return Prefetch(batches)
    pinned = (item.pin() if isinstance(item, Batch) else item for item in batches)
    # a thread begins on the first GPU, whichever is this process's
    return Prefetch(pinned, prepare=functools.partial(torch.cuda.set_device, device))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _StepEnd:
    """Stands behind a step's last row.

    Attributes:
        cost: of the step's examples, all ranks together.
        paid: what the ranks pay together in lock-step, idle ones too.
    """

    cost: float
    paid: float


class Feed:
    """This rank's packed rows of one step after the other, as a context.

    The next rows are made while the loop computes, those of the next step too.
    """

    def __init__(
        self,
        rows: Rows,
        costs: np.ndarray,
        plan: StepPlan,
        steps: range,
        *,
        tokens_per_row: int,
        device: torch.device,
        prepare: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Begin.

        Args:
            rows: the tokenised dataset.
            costs: [n], what each of its rows takes to compute.
            plan: which rows a step sees.
            steps: the steps to come, one after the other.
            tokens_per_row: the most tokens of a packed row.
            device: where the batches will be used; they stay on the host.
            prepare: called for each row on the feed's thread; adds what the loss needs, before the row is pinned.
        """
        self._prepare = prepare
        self._rows, self._costs, self._plan, self._steps = rows, costs, plan, steps
        self._tokens_per_row = tokens_per_row
        self._cost = self._paid = 0.0
        self._items = prefetched(self._make(), device)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *error: Any) -> None:
        self._items.__exit__(*error)

    @property
    def waited(self) -> float:
        """Seconds for which the loop stood still for want of a row."""
        return self._items.waited

    @property
    def idle_share(self) -> float:
        """Share of the steps so far for which the mean rank waits for a heavier one, by cost."""
        return 1 - self._cost / self._paid if self._paid else 0.0

    def step(self) -> Iterator[tuple[Batch, bool]]:
        """The rows of the next step, and whether each is the step's last."""
        row: Batch | None = None
        for item in self._items:
            if row is not None:
                yield row, isinstance(item, _StepEnd)
            if isinstance(item, _StepEnd):
                self._cost += item.cost
                self._paid += item.paid
                return
            row = item
        assert row is None, "rows without an end of their step"

    def _make(self) -> Iterator[Batch | _StepEnd]:
        ranks = world_size()
        for step in self._steps:
            indices = self._plan.indices(step)
            costs = self._costs[indices].tolist()
            dealt = deal(self._rows.lengths[indices].tolist(), costs, ranks, self._tokens_per_row)
            for batch in packed(self._rows, indices, dealt[rank()]):
                yield batch if self._prepare is None else self._prepare(batch)
            yield _StepEnd(sum(costs), ranks * time_of(dealt, costs))
