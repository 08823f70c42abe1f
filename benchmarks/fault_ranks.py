"""Starts and watches the ranks of a run. A rank is a fork of this process, which has paid for the imports once.

A fork runs the entry's own file as `__main__`, with the environment that a launcher would give it, in a session of its
own. `torchrun` itself is started likewise. Whatever a run leaves behind becomes a child of this process (it is their
subreaper), so no orphan is overlooked.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import os
import re
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "notus.training.dpo",
    "notus.training.sft",
    "transformers.models.mistral.modeling_mistral",
    "torch.distributed.elastic.agent.server.api",
    "tensorboard",
    "torch._dynamo",
)
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt): ")
_ended: dict[int, int] = {}  # exit codes of children, by process id


def prepare(scratch: Path) -> None:
    """Make this process one that can be forked into ranks: modules imported, one thread, caches in `scratch`."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(scratch / "datasets"),
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):  # some are optional
            importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    if ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl refuses PR_SET_CHILD_SUBREAPER: Linux is needed")


@dataclasses.dataclass(frozen=True)
class Command:
    """What the user would type: `ENTRY CONFIG --section.key=value ...` on so many ranks."""

    entry: str
    words: tuple[str, ...]
    ranks: int = 2
    torchrun: bool = False

    def arguments(self) -> list[str]:
        """The whole command line under torchrun."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        return [*launcher, f"--nproc-per-node={self.ranks}", str(ROOT / self.entry), *self.words]


@dataclasses.dataclass
class Launch:
    """A command under way. `pids`: its ranks; under torchrun, torchrun alone."""

    pids: list[int]
    log: Path
    began: float

    def codes(self) -> list[int | None]:
        """Exit codes so far; a signal's number, negative."""
        reap()
        return [_ended.get(pid) for pid in self.pids]

    def over(self) -> bool:
        return None not in self.codes()

    def wait(self, seconds: float) -> bool:
        """Until all have ended; whether they have."""
        return wait_until(self.over, seconds)

    def text(self) -> str:
        """All that the run has said."""
        return self.log.read_text(errors="replace")


def launch(command: Command, log: Path, before: Callable[[int], None] | None = None) -> Launch:
    """Start a command, its output going to `log`. In a forked rank, `before(rank)` is called ahead of the entry."""
    log.write_text("")
    began = time.monotonic()
    if command.torchrun:
        return Launch([_fork(log, {}, lambda: os.execv(sys.executable, command.arguments()))], log, began)
    port = _free_port()
    pids = []
    for rank in range(command.ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(command.ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pids.append(_fork(log, place if command.ranks > 1 else {}, lambda rank=rank: _enter(command, rank, before)))
    return Launch(pids, log, began)


def call(work: Callable[[], None], log: Path) -> None:
    """Run `work` in a fork, so that its threads and its random state are not this process's."""
    pid = _fork(log, {}, work)
    wait_until(lambda: reap() or pid in _ended, 300)
    if _ended.get(pid) != 0:
        raise RuntimeError(f"a preparation failed:\n{log.read_text()[-3000:]}")


def _enter(command: Command, rank: int, before: Callable[[int], None] | None) -> None:
    if before is not None:
        before(rank)
    sys.argv = [command.entry, *command.words]
    runpy.run_path(str(ROOT / command.entry), run_name="__main__")


def _fork(log: Path, environment: dict[str, str], work: Callable[[], object]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        os.chdir(ROOT)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reap() -> None:
    """Note the exit codes of all children that have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _ended[pid] = os.waitstatus_to_exitcode(status)


def wait_until(true: Callable[[], object], seconds: float, between: float = 0.005) -> bool:
    """Wait for a condition; whether it came about in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(between)
    return True


def descendants(root: int | None = None) -> list[int]:
    """Living processes below `root`, or below this one; the dead are reaped first."""
    reap()
    found = []
    for child in _children(root or os.getpid()):
        found += [child, *descendants(child)]
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


def ranks_of(run: Launch) -> list[int]:
    """The process ids of a run's ranks; none if torchrun has not started them yet."""
    if len(run.pids) > 1 or not _is_torchrun(run.pids[0]):
        return run.pids
    return [pid for pid in _children(run.pids[0]) if b"\0LOCAL_RANK=" in _environment(pid)]


def _is_torchrun(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def send(pids: Sequence[int], number: int) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_all(grace: float) -> list[int]:
    """Wait for every descendant to end; kill what has not, and return those."""
    wait_until(lambda: not descendants(), grace)
    orphans = descendants()
    send(orphans, signal.SIGKILL)
    wait_until(lambda: not descendants(), 10)
    return orphans


def told(run: Launch) -> str:
    """What the user is told of a fault: the error's line, warnings, the first exception that is no lost peer's."""
    lines = [line.strip() for line in run.text().splitlines() if line.strip()]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    kinds = (
        [line for line in lines if line.startswith("error: ")],
        [line for line in lines if line.startswith("warning: ")],
        [line for line in exceptions if "gloo" not in line],
        exceptions,
        lines[-1:],
    )
    return "; ".join(dict.fromkeys(next((kind for kind in kinds if kind), ["nothing"])))
