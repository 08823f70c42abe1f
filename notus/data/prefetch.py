"""Items that a thread makes before they are asked for."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

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
