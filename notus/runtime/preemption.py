"""When a run is to end before its last step: SIGTERM, SIGINT, and `training.max_hours`.

The signals are seen by a thread, through the descriptor that Python's C handler writes to: the main thread may be deep
inside a collective. While the loop trains, the first signal is a request, which all ranks hear of at the end of the
step; a later one ends the process at once. Outside the loop there is nothing to save, and the first one ends it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from notus.runtime.process import STOPPED, follow_parent, tell_apart

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Schedulers signal every process of a job, and torchrun then passes its own on: that is one request.
_ECHO_SECONDS = 1.0


class Interrupted(Exception):
    """A rank got a signal before the work at hand was done; raised on all."""


class Stop:
    """Requests to end early; a context in which the process listens for them."""

    def __init__(self, max_hours: float | None = None) -> None:
        """Count the budget of `max_hours` from now on; None: no limit."""
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._signalled: float | None = None
        self.requested = False
        self._patient = False

    @property
    def signalled(self) -> bool:
        """Whether this process was asked to stop by a signal."""
        return self._signalled is not None

    def request(self) -> None:
        """Ask to stop after the next step, as if the time were used up."""
        self.requested = True

    @property
    def overdue(self) -> bool:
        """Whether the time is used up, or `request` was called."""
        return self.requested or (self._deadline is not None and time.monotonic() >= self._deadline)

    def check(self) -> None:
        """Ask all ranks, on the host alone, whether one of them got a signal; collective. Raises Interrupted if so."""
        wanted = torch.tensor([float(self.signalled)])
        dist.all_reduce(wanted)
        if wanted.item():
            raise Interrupted

    @contextlib.contextmanager
    def in_loop(self) -> Iterator[None]:
        """While this lasts, the first signal is a request that the caller looks at."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals; only a process's main thread can, another one leaves them as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        global _pipe
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reading,), daemon=True)
        watcher.start()
        _pipe = (reading, writing)
        try:
            yield
        finally:
            _pipe = ()
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writing)
            watcher.join()
            os.close(reading)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Handle signals within a program that continues afterwards, such as a notebook; never end the process itself.

        The first signal within `in_loop` is a request, and at the end of the context it goes to the handler that was
        there before: once all is saved, Ctrl-C raises KeyboardInterrupt and SIGTERM ends the program. Every other
        signal goes to that handler at once. Outside a process's main thread, nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        held: list[int] = []

        def handle(number: int, _: object) -> None:
            now = time.monotonic()
            if self._signalled is None and self._patient:
                self._signalled = now
                held.append(number)
                _tell(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint")
            elif self._signalled is None or now - self._signalled > _ECHO_SECONDS:
                held.clear()
                _hand_on(number, before[signal.Signals(number)])

        for number in SIGNALS:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if held:
            signal.raise_signal(held[0])

    def _watch(self, reading: int) -> None:
        while received := os.read(reading, 1):
            if received[0] in SIGNALS:
                self._receive(signal.Signals(received[0]))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._signalled is None and self._patient:
            self._signalled = now
            _tell(f"{number.name}: stopping after this step; a second or more from now, another one ends the run")
        elif self._signalled is None:
            _tell(f"{number.name}: stopped outside the training steps; the same command resumes the run")
            os._exit(STOPPED)
        elif now - self._signalled > _ECHO_SECONDS:
            _tell(f"{number.name} again: stopped at once; the same command resumes from the last checkpoint")
            os._exit(128 + number)


def _hand_on(number: int, handler: Any) -> None:
    """Let an earlier handler take a signal; None: one that was not set from Python."""
    if callable(handler):
        handler(number, None)
    elif handler != signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


_pipe: tuple[int, ...] = ()  # of the one `Stop` that listens


def _block() -> None:
    if _pipe:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    if _pipe:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _forget_in_child() -> None:
    """A forked process (a tokeniser's worker, say) has no thread to watch, and shares the pipe: it ends as usual.

    It also ends with the process that needs its work, however that ends.
    """
    if _pipe:
        signal.set_wakeup_fd(-1)
        for descriptor in _pipe:
            os.close(descriptor)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        follow_parent(signal.SIGKILL)
        _unblock()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget_in_child)


def _tell(text: str) -> None:
    """One rank speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        tell_apart(text)
