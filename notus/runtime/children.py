"""Commands of this project as child processes: how they are started, how signals reach them, who may run them where.

Imports no torch.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from notus.runtime.files import lock
from notus.runtime.process import follow_parent, tell

LOCK = ".lock"
_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds that torchrun gives its ranks to save; 30 by default


def process_count(text: str) -> int:
    """A number of processes, for argparse."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return int(text)


def notus_command(words: Sequence[str], nproc_per_node: int | None = None) -> list[str]:
    """Return the complete command line of `notus WORDS`, under torchrun if `nproc_per_node` says on how many ranks."""
    if nproc_per_node is None:
        return [sys.executable, "-m", "notus", *words]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc_per_node}"]
    # without the `--`, torchrun would take an option such as --n for one of its own, abbreviated
    return [sys.executable, *torchrun, "-m", "--", "notus", *words]


class Child:
    """The command that runs now. SIGTERM and SIGINT are passed on to it, and it saves before it ends."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self.signal = 0  # the first one that came
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals within the block."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end and return its exit code; if this process is killed, the child gets SIGTERM."""
        # In a group of its own, Ctrl-C reaches it once, from here, not a second time from the terminal.
        self._process = subprocess.Popen(
            command,
            env={_GRACE: "600", **os.environ},
            process_group=0,
            preexec_fn=lambda: follow_parent(signal.SIGTERM),
        )
        if self.signal:  # it came while the process was started
            self._process.send_signal(self.signal)
        try:
            return self._process.wait()
        finally:
            self._process = None

    def _receive(self, number: int, _: object) -> None:
        self.signal = self.signal or number
        if self._process is not None:
            self._process.send_signal(number)


@contextlib.contextmanager
def hold(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Keep another process that does the same out of a folder, which is made if need be.

    Args:
        folder: that of a sweep, say.
        what: who uses it, for messages: "sweep".
        remedy: how to name another folder, for messages: "choose another --output".

    Raises:
        ValueError: the folder is in use, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise ValueError(f"the {what}'s folder {folder} cannot be written ({error}): {remedy}") from error
    with file:
        try:
            lock(file)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is in use by another {what}: wait for its end, or {remedy}") from error
        except OSError as error:
            tell(f"note: {folder} cannot be locked ({error.strerror}); do not start a second {what} in it")
        yield
