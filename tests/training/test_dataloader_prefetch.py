"""Items made ahead on a thread: their order, their number, their errors, and the thread's end."""

import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from notus.training.dataloader import Prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_all_items_come_in_order_from_another_thread() -> None:
    where = []

    def items() -> Iterator[int]:
        for number in range(9):
            where.append(threading.current_thread())
            yield number

    with Prefetch(items(), prepare=lambda: where.append(threading.current_thread())) as ready:
        assert list(ready) == list(range(9))
        assert list(ready) == []
    assert len(where) == 10
    assert set(where).isdisjoint([threading.current_thread()])
    assert len(set(where)) == 1
    assert threads() == []


def test_the_next_items_are_made_while_one_is_in_use_and_no_more_than_asked_for() -> None:
    made, third = [], threading.Event()

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    with Prefetch(items(), ahead=2) as ready:
        assert next(ready) == 0
        assert third.wait(10)  # nobody has asked for 1 or 2
        time.sleep(0.05)
        assert made == [0, 1, 2]
    assert made == [0, 1, 2]
    assert threads() == []


def test_an_error_comes_in_its_place_with_its_own_traceback() -> None:
    def this_fails() -> None:
        raise OSError("the disk is gone")

    def items() -> Iterator[int]:
        yield 1
        this_fails()

    with Prefetch(items()) as ready:
        assert next(ready) == 1
        with pytest.raises(OSError, match="the disk is gone") as caught:
            next(ready)
    assert "this_fails" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert threads() == []


def test_the_thread_ends_when_the_user_of_the_items_fails() -> None:
    def step() -> None:
        with Prefetch(iter(range(100))) as ready:
            next(ready)
            raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        step()
    assert threads() == []


def test_the_wait_is_measured() -> None:
    def items(seconds: float) -> Iterator[int]:
        for number in range(3):
            time.sleep(seconds)
            yield number

    with Prefetch(items(0.1)) as slow:
        list(slow)
    with Prefetch(items(0.0)) as quick:
        for _ in quick:
            time.sleep(0.1)
    assert 0.28 < slow.waited < 3
    assert quick.waited < 0.1
