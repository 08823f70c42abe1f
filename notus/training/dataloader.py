"""The dataloader: packed rows, balanced over ranks by cost, and made on a thread before they are needed."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from notus.data.batching import StepPlan, balance, lockstep_cost, packed
from notus.data.packing import Batch
from notus.model.flops import dimensions, forward_flops
from notus.model.policy import Policy
from notus.runtime.distributed import rank, world_size

if TYPE_CHECKING:  # `datasets` is not needed to load what is tokenised
    from notus.data.dataset import TokenizedDataset

T = TypeVar("T")


class Prefetch(Generic[T]):
    """The items of an iterator, in its order; a thread of its own makes the next ones while one is in use.

    A context: the thread ends with it, at the latest when the item it is making is done. What the iterator raises is
    raised where the item would have come, with the traceback of where it happened.

    Attributes:
        waited: seconds that the user of the items has waited for them.
    """

    def __init__(self, items: Iterator[T], *, ahead: int = 2, prepare: Callable[[], object] | None = None) -> None:
        """Begin.

        Args:
            items: runs on the thread alone.
            ahead: the most items that are ready, or being made, before they are asked for.
            prepare: called once on the thread, before the first item.
        """
        self.waited = 0.0
        self._items = items
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=prepare)
        self._coming: deque[Future[list[T]]] = deque(self._thread.submit(self._make) for _ in range(ahead))

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        found = self._coming.popleft().result()
        self.waited += time.perf_counter() - began
        self._coming.append(self._thread.submit(self._make))
        if not found:
            raise StopIteration
        return found[0]

    def _make(self) -> list[T]:
        """The next item; none at the end."""
        for item in self._items:
            return [item]
        return []


def row_costs(policy: Policy, rows: "TokenizedDataset", indices: np.ndarray | None = None) -> np.ndarray:
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


class Dataloader:
    """This rank's packed rows of one step after the other, as a context.

    The next rows are made while the loop computes, those of the next step too.
    """

    def __init__(
        self,
        rows: "TokenizedDataset",
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
            prepare: called for each row on the dataloader's thread; adds what the loss needs, before the row is pinned.
        """
        self._prepare = prepare
        self._rows, self._costs, self._plan, self._steps = rows, costs, plan, steps
        self._tokens_per_row = tokens_per_row
        self._cost = self._paid = 0.0
        self._items = prefetched(self._make(), device)

    def __enter__(self) -> "Dataloader":
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
            balanced = balance(self._rows.lengths[indices].tolist(), costs, ranks, self._tokens_per_row)
            for batch in packed(self._rows, indices, balanced[rank()]):
                yield batch if self._prepare is None else self._prepare(batch)
            yield _StepEnd(sum(costs), ranks * lockstep_cost(balanced, costs))
