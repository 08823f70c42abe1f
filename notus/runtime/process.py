"""How every entry begins and ends: what PyTorch reads when it is imported; one line and exit code 1 for a mistake.

What happens at a print never decides how a run ends: see `guard_streams`. Imports no torch.
"""

import contextlib
import ctypes
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TextIO

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


class _Output(io.FileIO):
    """A standard stream's descriptor, on which writing never fails.

    What cannot be written is dropped, and so is everything after it.
    """

    _gone = False

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, block: Any) -> int:
        """Write bytes, waiting for a reader of a non-blocking pipe; returns how many are written or dropped."""
        while not self._gone:
            try:
                written = super().write(block)
            except OSError as error:
                self._gone = True
                _report_lost(self.fileno(), error)
                break
            if written is not None:
                return written
            select.select([], [self.fileno()], [])
        return len(block)


# Descriptors of the standard streams whose disk failed. A reader that has left (`| head`) is no failure.
_lost: set[int] = set()
_NAMES = {1: "stdout", 2: "stderr"}
_READER_LEFT = {errno.EPIPE, errno.EBADF, errno.ECONNRESET}


def _report_lost(descriptor: int, error: OSError) -> None:
    """Say on the other stream, once, that a standard stream cannot be written, unless its reader simply left."""
    if descriptor in _lost or error.errno in _READER_LEFT:
        return
    _lost.add(descriptor)
    other = sys.stdout if descriptor == 2 else sys.stderr
    what = f"{_NAMES[descriptor]} cannot be written ({error.strerror or error})"
    tell(f"warning: {what}: nothing more is shown there, and the work continues", other)


def guard_streams() -> None:
    """Make sure that no print to stdout or stderr can fail; every entry calls this before it prints or opens a file.

    A closed stream (`>&-`) goes to /dev/null, so that no file that is opened later gets its number and what others
    print. A character that the stream's encoding lacks is escaped. A stream whose reader left is silent from then on;
    so is one whose disk fails, which the other stream reports. Streams that were replaced before are left alone.
    """
    _open_closed_descriptors()
    for name in ("stdout", "stderr"):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115
        elif stream is original and not isinstance(getattr(stream.buffer, "raw", None), _Output):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            guarded = _guarded(stream)
            setattr(sys, name, guarded)
            setattr(sys, f"__{name}__", guarded)


def _open_closed_descriptors() -> None:
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _guarded(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """A stream to the same descriptor with the same encoding, whose writes cannot fail."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno())),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def tell(text: object, stream: TextIO | None = None) -> bool:
    """Print a line to stdout, or to `stream`; never raises.

    Returns:
        False if a disk failed behind the stream, now or earlier: for a command whose result is what it prints.
    """
    stream = stream or sys.stdout
    if stream is None:  # closed, and not guarded: a program of the user's own, which imports this package
        return True
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # held in memory; closed; or within another print
        try:
            _print_encoded(text, stream)
        except OSError as error:  # the stream is not guarded
            _silence(stream.fileno(), error)
        return stream.fileno() not in _lost
    return True


def tell_apart(text: object) -> bool:
    """`tell` to stderr, at the start of a line even if another rank's progress bar has not ended its own."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return tell(f"\n{text}" if several else text, sys.stderr)


def _silence(descriptor: int, error: OSError) -> None:
    """Report what keeps a standard stream from being written; drop what it holds, and all that follows."""
    if descriptor in _NAMES:
        _report_lost(descriptor, error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _print_encoded(text: object, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        print(str(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


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
    guard_streams()
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
            _tell_error(error)
        return 1
    except LostPeers as lost:
        if _failures(1, speaker=lost.speaker) == 1:
            _tell_error(lost)
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            tell_apart("stopped by Ctrl-C")
        return 128 + signal.SIGINT
    except RuntimeError:
        if "RANK" in os.environ and _failures(0) > 0:
            return 1
        raise


def _tell_error(error: Exception) -> None:
    """Print an error to stderr; if the disk behind it is full, to stdout."""
    if not tell_apart(f"error: {error}"):
        tell(f"error: {error}")


def _stop_early(number: int, _: object) -> NoReturn:
    """End the process while Python imports, say; `notus.runtime.preemption` takes over when a run begins."""
    if os.environ.get("RANK", "0") == "0":
        tell_apart(f"{signal.Signals(number).name}: stopped before the run began; the same command starts it")
    os._exit(STOPPED)


def leave(code: int) -> NoReturn:
    """End the process; once torch was used, without the interpreter's teardown, in which gloo's threads may abort."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
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
