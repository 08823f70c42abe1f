"""Start the ranks of a run, watch them, break them, and see what they leave behind.

A rank is a fork of a server that has imported everything, so that a run starts in a fraction of a second. It runs the
entry's own file as `__main__`, with the environment that a launcher would give it, in a session of its own. torchrun
itself is started likewise.
"""

import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ("notus.training.dpo", "notus.training.sft", "transformers.models.mistral.modeling_mistral", "tensorboard",
            "torch.distributed.elastic.agent.server.api", "torch._dynamo")  # fmt: skip
MARK = "NOTUS_FAULT_RUN"  # environment variable that marks the processes of a launch
PARTS_OF = ("notus.training.reference", "PART_SIZE")  # rows of the reference pass between two of its files
_CONTEXT = multiprocessing.get_context("forkserver")
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt): ")

Hook = Callable[[int], None]  # called with the rank before the entry runs; must be picklable


@dataclasses.dataclass(frozen=True)
class Command:
    """What the user would type: `ENTRY CONFIG --section.key=value ...` on so many ranks."""

    entry: str
    words: tuple[str, ...]
    ranks: int = 2
    torchrun: bool = False


@dataclasses.dataclass
class Launch:
    """A command under way; `processes` are its ranks, or torchrun alone."""

    processes: list[BaseProcess]
    log: Path
    mark: str
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None]

    def codes(self) -> list[int | None]:
        """Exit codes so far; a signal's number, negative."""
        return [process.exitcode for process in self.processes]

    def over(self) -> bool:
        return None not in self.codes()

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended; return whether they have."""
        return wait_until(self.over, seconds)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Process ids of the ranks; none if torchrun has not started them yet."""
        if len(self.pids) > 1:
            return self.pids
        return [pid for pid in self.left() if pid not in self.pids and b"\0LOCAL_RANK=" in _environment(pid)]

    def left(self) -> list[int]:
        """Living processes that this launch started, and those that they started."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session, *_ = (path / "stat").read_text().rpartition(")")[2].split()
                pid = int(path.name)
                if state != "Z" and (int(session) in self.pids or self.mark.encode() in _environment(pid)):
                    found.append(pid)
        return sorted(found)

    def end(self, grace: float) -> list[int]:
        """Wait for every process to end; kill and return those that have not."""
        wait_until(lambda: not self.left(), grace)
        orphans = self.left()
        send(orphans, signal.SIGKILL)
        wait_until(lambda: not self.left(), 10)
        return orphans

    def message(self) -> str:
        """What the user sees of a fault: errors, else warnings, else exceptions but a lost peer's, else the end."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        exceptions = [line for line in lines if _EXCEPTION.match(line)]
        kinds = (
            [line for line in lines if line.startswith("error: ")],
            [line for line in lines if line.startswith("warning: ")],
            [line for line in exceptions if "gloo" not in line],
            exceptions,
            lines[-1:],
        )
        return "; ".join(dict.fromkeys(next((kind for kind in kinds if kind), ["nothing"])))


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def launch(command: Command, log: Path, *hooks: Hook) -> Launch:
    """Start a command, its output going to `log`; `hooks` are called in each forked rank ahead of the entry."""
    log.write_text("")
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    mark, port = uuid.uuid4().hex, str(free_port())
    common = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank in range(1 if command.torchrun else command.ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(command.ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = common | ({} if command.torchrun else place)
        processes.append(_CONTEXT.Process(target=_enter, args=(command, rank, environment, log, hooks)))
        processes[-1].start()
    return Launch(processes, log, mark)


def _enter(command: Command, rank: int, environment: dict[str, str], log: Path, hooks: Sequence[Hook]) -> None:
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if command.torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        ranks = f"--nproc-per-node={command.ranks}"
        os.execv(sys.executable, [sys.executable, *launcher, ranks, command.entry, *command.words])
    torch.set_num_threads(1)
    for hook in hooks:
        hook(rank)
    sys.argv = [command.entry, *command.words]
    runpy.run_path(command.entry, run_name="__main__")


def wait_until(true: Callable[[], object], seconds: float, between: float = 0.005) -> bool:
    """Wait for a condition; return whether it came about in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(between)
    return True


def send(pids: Sequence[int], number: int) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# ---- hooks ----


def small_parts(_rank: int) -> None:
    """Cut the reference pass into several files, as that of a large dataset is."""
    setattr(importlib.import_module(PARTS_OF[0]), PARTS_OF[1], 16)


def around(target: str, wrapper: Callable[..., Any], *, on: int | None = 0) -> Hook:
    """On one rank (None: on all), call `wrapper(function, ...)` in place of `module:name.of.function`."""
    return functools.partial(_wrap, target, wrapper, on)


def before(target: str, action: Callable[[], object], *, on: int | None = 0) -> Hook:
    """On one rank, call `action` ahead of each call of `module:name.of.function`."""
    return around(target, functools.partial(_after_action, action), on=on)


def _wrap(target: str, wrapper: Callable[..., Any], on: int | None, rank: int) -> None:
    if on not in (None, rank):
        return
    module, _, names = target.partition(":")
    *path, name = names.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    work = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: wrapper(work, *arguments, **options))


def _after_action(action: Callable[[], object], work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    action()
    return work(*arguments, **options)
