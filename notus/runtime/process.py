"""How every entry begins and ends: what PyTorch reads when it is imported; one line and exit code 1 for a mistake.

Imports no torch.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TextIO

from notus.runtime import switches

# The exit code of a run that a signal ended after it had saved its progress: EX_TEMPFAIL, run the command again.
STOPPED = 75
_FAILURES = "notus/failures"
_PR_SET_PDEATHSIG = 1
# PyTorch 2.11 to 2.13 read them all; for CUDA, the older names come first.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class LostPeers(RuntimeError):
    """Other ranks are gone or stuck; the message names them. `speaker`: the remaining rank that reports it."""

    def __init__(self, message: str, speaker: int) -> None:
        super().__init__(message)
        self.speaker = speaker


def configure_allocator() -> None:
    """Let the GPU memory of PyTorch grow in place, unless the user has configured it; call before torch is imported.

    Packed rows differ in length, and so do their tensors. In segments of fixed size, they would leave holes that
    nothing else fits into.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def tell(text: object, stream: TextIO | None = None) -> None:
    """Print a line. If nobody reads the stream any more (`tee` got the same Ctrl-C, say), drop it."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def follow_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def run_entry(work: Callable[[], int | None], *, resumable: bool = False) -> int:
    """Run an entry's body and return the process's exit code.

    Args:
        work: the body; returns its exit code, or None for 0.
        resumable: the same command resumes the run, so SIGTERM and SIGINT end it with `STOPPED`, from the start.

    Under torchrun every rank may meet the same mistake, or one rank alone; the first one reports it, and torchrun
    ends the rest. A rank that loses its peers because one of them has reported a mistake is silent.

    Ctrl-C, where nothing else takes it, ends in a line and exit code 130.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent(signal.SIGTERM)  # when torchrun is killed, its ranks would else train on, or wait for ever
    if resumable:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop_early)
    try:
        switches.disabled_names()  # a mistyped name fails before any work
        return work() or 0
    except (ValueError, OSError) as error:
        if _failures(1) == 1:
            tell(f"error: {error}", sys.stderr)
        return 1
    except LostPeers as lost:
        if _failures(1, speaker=lost.speaker) == 1:
            tell(f"error: {lost}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            tell("stopped by Ctrl-C", sys.stderr)
        return 128 + signal.SIGINT
    except RuntimeError:
        if "RANK" in os.environ and _failures(0) > 0:
            return 1
        raise


def _stop_early(number: int, _: object) -> NoReturn:
    """While Python imports, say; `notus.runtime.preemption` takes over when a run begins."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"{signal.Signals(number).name}: stopped before the run began; the same command starts it", sys.stderr)
    os._exit(STOPPED)


def leave(code: int) -> NoReturn:
    """End the process; once torch was used, without the interpreter's teardown, in which gloo's threads may abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    if "torch.distributed" in sys.modules:
        os._exit(code)
    sys.exit(code)


def _failures(more: int, speaker: int = 0) -> int:
    """Add to the number of ranks that met a mistake and return it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # another launcher: no store outlives the process group, so one rank speaks
        return more if int(os.environ.get("RANK", "0")) == speaker else 2 * more
    from torch.distributed import DistError, TCPStore

    # torchrun's own store, which outlives the process group
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    except DistError:  # its machine is gone
        return more
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(store.add(f"{_FAILURES}/{attempt}", more))
