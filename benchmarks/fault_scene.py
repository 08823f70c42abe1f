"""One small run and the ways to break it; each fault of the table gets a fresh one."""

import contextlib
import dataclasses
import functools
import importlib
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault_ranks import Launch, descendants, end_all, launch, send, wait_until
from fault_runs import CASES, Undisturbed, small_parts, undisturbed

LIMIT = 150.0  # seconds after which a broken run counts as one that never ends
FULL, LORA, SFT = CASES
Hook = Callable[[int], None]


@dataclasses.dataclass
class Scene:
    """A run's folder on a file system of its own, and the model and data it starts from.

    Attributes:
        shared: the inputs, and an interrupted run, that all scenes share; read only.
        root: this scene's own copy of the inputs.
        measure: what the run leaves if nothing breaks it.
    """

    shared: Path
    root: Path
    measure: Undisturbed

    @property
    def folder(self) -> Path:
        """The run's folder; `disk` is a small file system in memory."""
        return self.disk / "run"

    @property
    def disk(self) -> Path:
        return self.root / "disk"

    def start(self, *more: str, before: Hook | None = None, ranks: int = 2, torchrun: bool = False) -> Launch:
        """Start the command, `before` called in each rank ahead of it."""

        def prepare(rank: int) -> None:
            small_parts(rank)
            if before is not None:
                before(rank)

        inputs = (f"--model.name_or_path={self.root / 'model'}", f"--data.train={self.root / 'train-dpo.jsonl'}")
        command = FULL.command(self.shared, self.folder, *inputs, *more, ranks=ranks, torchrun=torchrun)
        return launch(command, self.root / "log", prepare)

    def run(self, *more: str, before: Hook | None = None) -> Launch:
        """The same, until it ends; one that does not is left to the caller."""
        run = self.start(*more, before=before)
        run.wait(LIMIT)
        return run

    def run_to(self, step: int, before: Hook | None = None) -> Launch:
        """Start, and return as soon as the checkpoint of `step` is there."""
        run = self.start(before=before)
        reached = self.folder / "checkpoints" / f"step-{step:08d}"
        if not wait_until(lambda: reached.exists() or run.over(), LIMIT):
            raise RuntimeError(f"no checkpoint of step {step}:\n{run.text()[-2000:]}")
        return run

    def interrupted(self) -> None:
        """Leave the folder as a run that was killed after step 6 does."""
        run = self.run_to(6)
        send(run.pids, signal.SIGKILL)
        end_all(10)

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"), reverse=True)

    def fill(self) -> None:
        """Leave no byte free on the disk."""
        with (self.disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        (self.disk / "ballast").unlink(missing_ok=True)


@contextlib.contextmanager
def scenes(shared: Path) -> Iterator[Callable[[], contextlib.AbstractContextManager[Scene]]]:
    """Scenes measured by one undisturbed run."""
    measure = undisturbed(FULL, shared, shared / "undisturbed-faults", False)

    @contextlib.contextmanager
    def scene() -> Iterator[Scene]:
        made = Scene(shared, shared / "scene", measure)
        made.disk.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", "size=48m", "tmpfs", str(made.disk))
        shutil.copytree(shared / "model", made.root / "model")
        shutil.copy(shared / "train-dpo.jsonl", made.root)
        try:
            yield made
        finally:
            if descendants():
                end_all(0)
            subprocess.run(["umount", "-R", str(made.disk)], check=True)
            shutil.rmtree(made.root)

    yield scene


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a file system read-only for a while."""
    _mount("-o", "remount,ro", str(folder))
    try:
        yield
    finally:
        _mount("-o", "remount,rw", str(folder))


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_logps(path: Path) -> None:
    """Flip the lowest bit of the first log-prob of a reference cache: it stays a plausible number."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[8 + size + json.loads(content[8 : 8 + size])["logps"]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def ahead_of(target: str, action: Callable[[], object], *, on: int = 0) -> Hook:
    """In one rank, call `action` ahead of each call of `module:name.of.function`."""
    return _wrap(target, on, lambda work, *a, **k: (action(), work(*a, **k))[1])


def instead(target: str, change: Callable[[Any], Any], *, on: int = 0) -> Hook:
    """In one rank, change the result of each call of `module:name.of.function`."""
    return _wrap(target, on, lambda work, *a, **k: change(work(*a, **k)))


def _wrap(target: str, on: int, around: Callable[..., Any]) -> Hook:
    def hook(rank: int) -> None:
        if rank != on:
            return
        module, _, names = target.partition(":")
        *path, name = names.split(".")
        owner = functools.reduce(getattr, path, importlib.import_module(module))
        work = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **options: around(work, *arguments, **options))

    return hook
