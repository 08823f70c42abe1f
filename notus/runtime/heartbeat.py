"""Signs of life, so that ranks whose exchange fails can name those that are gone.

A thread of each rank counts up in the process group's store. A rank that loses the others listens for a while: whose
count stands still is gone or stopped. Counts, not times, are compared, so clocks may differ.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from notus.runtime.process import LostPeers, first_line

BEAT = 1.0  # seconds
LISTEN = 6.0  # seconds; long beside a beat, as a busy machine may delay a few
_STORE_TIMEOUT = datetime.timedelta(seconds=10)
_LOST, _FINISHED = "lost", "finished"


@contextlib.contextmanager
def heartbeat() -> Iterator[None]:
    """Show signs of life within the context; an exchange that fails there ends in `LostPeers`, naming ranks."""
    if dist.get_world_size() == 1:
        yield
        return
    signs = _Signs()
    state = _FINISHED
    try:
        yield
    except RuntimeError as error:
        if not _is_exchange(error):
            state = f"ended: {type(error).__name__}"
            raise
        state = _LOST
        raise LostPeers(*_judge(signs, error)) from error
    except BaseException as error:
        state = f"ended: {type(error).__name__}: {error}"
        raise
    finally:
        signs.stop(state)


class _Signs:
    """This rank's count in the store, and the others'."""

    def __init__(self) -> None:
        # a connection of its own, for the thread
        self.store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.store.set_timeout(_STORE_TIMEOUT)
        self._count, self._state, self._stopped = 0, "", threading.Event()
        self._lock = threading.Lock()
        self.show("")
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def show(self, state: str | None = None) -> None:
        """Count up, and say how this rank fares: "" while it runs; None: as before."""
        with self._lock:
            self._count += 1
            self._state = self._state if state is None else state
            self.store.set(_key(dist.get_rank()), json.dumps([socket.gethostname(), self._count, self._state]))

    def read(self) -> dict[int, tuple[str, int, str]]:
        """Host, count and state of every rank that has shown any."""
        with self._lock:
            keys = {rank: _key(rank) for rank in range(dist.get_world_size())}
            return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def stop(self, state: str) -> None:
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(dist.DistError):  # the store may have left with its rank
            self.show(state)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                self.show()
            except dist.DistError:  # the store is gone: the next exchange will fail
                return


def _key(rank: int) -> str:
    return f"notus/heartbeat/{rank}"


def _is_exchange(error: RuntimeError) -> bool:
    """Whether it comes from the exchange between ranks; gloo raises a plain RuntimeError that names its own source."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _judge(signs: _Signs, error: RuntimeError) -> tuple[str, int]:
    """The message, and the lowest of the ranks that remain, who prints it."""
    try:
        signs.show(_LOST)
        before = signs.read()
        time.sleep(LISTEN)
        after = signs.read()
    except dist.DistError as no_answer:
        by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeper = (
            "the machine that keeps torchrun's rendezvous" if by_torchrun else "rank 0, who keeps the list of ranks,"
        )
        return f"lost contact with other ranks: {keeper} is gone or stopped ({_reason(no_answer)})", dist.get_rank()
    findings, remaining = [], [dist.get_rank()]
    for rank, (host, _, state) in after.items():
        if state == _LOST:
            remaining.append(rank)
        elif state:
            findings.append(f"rank {rank} ({host}) {state}")
        elif before.get(rank) == after[rank]:
            findings.append(f"rank {rank} ({host}) is gone or stopped")
        else:
            findings.append(f"rank {rank} ({host}) is alive, but did not arrive in time")
    who = "; ".join(findings) or "all of them are alive, the connection between them failed"
    return f"lost contact with other ranks: {who} ({_reason(error)})", min(remaining)


def _reason(error: RuntimeError) -> str:
    return first_line(error).split(". This is typically")[0]  # gloo adds advice
