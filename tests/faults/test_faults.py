"""Every fault of docs/faults.md is really caused; then the cause is removed and the same command must end as an
undisturbed run does, weights and metrics bitwise. By default only a few are caused: see conftest.py.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import Hook, Launch, around, before, launch, send, small_parts, wait_until
from small_runs import FULL, Undisturbed, digests, metrics
from toys import toy_model

from notus.runtime.files import is_locked
from notus.training.run_folder import LOCK

LIMIT = 150.0  # seconds after which a broken run counts as one that never ends
# Where the program is broken: `module:name.of.function`.
SAVE = "notus.training.trainer:Trainer._save"
STEP = "notus.training.trainer:Trainer._step"
GRADIENTS = "notus.training.trainer:local_gradients"
EXPORT = "notus.training.setup:Run._export"
LOSS = "notus.training.dpo:DPOTask.row_loss"
REFERENCE = "notus.training.dpo:reference_logps"
REFERENCE_SCORES = "notus.training.dpo:score"


@dataclasses.dataclass
class Scene:
    """A fresh run, and its own copy of the model and data it starts from.

    Attributes:
        shared: the configs, which all scenes share.
        root: this scene's folder; the run's folder is `root/disk/run`.
    """

    shared: Path
    root: Path

    @property
    def disk(self) -> Path:
        return self.root / "disk"

    @property
    def folder(self) -> Path:
        return self.disk / "run"

    @property
    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"), reverse=True)

    def start(self, *more: str, hooks: tuple[Hook, ...] = (), torchrun: bool = False) -> Launch:
        inputs = (f"--model.name_or_path={self.root / 'model'}", f"--data.train={self.root / 'train-dpo.jsonl'}")
        command = FULL.command(self.shared, self.folder, *inputs, *more, torchrun=torchrun)
        return launch(command, self.root / "log", small_parts, *hooks)

    def run(self, *more: str, hooks: tuple[Hook, ...] = ()) -> Launch:
        """Start it and wait for its end; one that does not end is left to the caller."""
        run = self.start(*more, hooks=hooks)
        run.wait(LIMIT)
        return run

    def run_to(self, step: int, hooks: tuple[Hook, ...] = ()) -> Launch:
        """Start it, and return as soon as the checkpoint of `step` is there."""
        run = self.start(hooks=hooks)
        reached = self.folder / "checkpoints" / f"step-{step:08d}"
        assert wait_until(lambda: reached.exists() or run.over(), LIMIT), run.text()[-2000:]
        return run

    def interrupt(self) -> None:
        """Leave the folder as a run that was killed after step 6 does."""
        run = self.run_to(6)
        send(run.pids, signal.SIGKILL)
        run.end(10)
        # a killed process is gone from /proc a moment before its files, and so its lock, are closed
        wait_until(lambda: not is_locked(self.folder / LOCK), 10)


@pytest.fixture
def scene(scratch, tmp_path) -> Iterator[Scene]:
    made = Scene(scratch, tmp_path)
    made.disk.mkdir()
    shutil.copytree(scratch / "model", made.root / "model")
    shutil.copy(scratch / "train-dpo.jsonl", made.root)
    yield made
    while os.path.ismount(made.disk):
        subprocess.run(["umount", made.disk], check=True)


# ---- causes: each yields the broken run once it has ended, and removes the cause at its end ----

Cause = Callable[[Scene], Iterator[Launch]]


def killed(scene: Scene) -> Iterator[Launch]:
    run = scene.run_to(3)
    send(run.pids[1:], signal.SIGKILL)
    run.wait(LIMIT)
    yield run


def torchrun_killed(scene: Scene) -> Iterator[Launch]:
    """Nobody is left to end the ranks; they must not train on beside the next launch."""
    run = scene.start(torchrun=True)
    wait_until(lambda: (scene.folder / "metrics.jsonl").exists() or run.over(), LIMIT)
    send(run.pids, signal.SIGKILL)
    wait_until(lambda: run.over() and not run.left(), 20)
    yield run


def disk_full(target: str) -> Cause:
    """From the first call of `target` on, a small file system in memory is full."""

    def cause(scene: Scene) -> Iterator[Launch]:
        _mount(scene.disk, "-t", "tmpfs", "-o", "size=48m", "tmpfs")
        yield scene.run(hooks=(before(target, functools.partial(_fill, scene.disk / "ballast")),))
        (scene.disk / "ballast").unlink()

    return cause


def _mount(folder: Path, *words: str) -> None:
    if subprocess.run(["mount", *words, folder], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount: as root, or `unshare --map-root-user --mount pytest ...`")


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def read_only_disk(scene: Scene) -> Iterator[Launch]:
    _mount(scene.disk, "-t", "tmpfs", "-o", "size=48m", "tmpfs")
    _mount(scene.disk, "-o", "remount,ro")
    run = scene.run()
    _mount(scene.disk, "-o", "remount,rw")
    yield run


def file_in_the_way(scene: Scene) -> Iterator[Launch]:
    scene.folder.write_text("a file")
    yield scene.run()
    scene.folder.unlink()


def bad_checkpoint(harm: Callable[[Path], None], pattern: str) -> Cause:
    """The newest checkpoint of an interrupted run is harmed; nothing takes that away."""

    def cause(scene: Scene) -> Iterator[Launch]:
        scene.interrupt()
        harm(next(scene.checkpoints[0].glob(pattern)))
        yield scene.run()

    return cause


def no_checkpoint_whole(scene: Scene) -> Iterator[Launch]:
    scene.interrupt()
    for path in scene.checkpoints:
        flip(next(path.glob("*.safetensors")))
    yield scene.run()
    shutil.rmtree(scene.folder)


def bad_cache(harm: Callable[[Path], None]) -> Cause:
    """The reference caches of an interrupted run are harmed; the remedy is to delete them."""

    def cause(scene: Scene) -> Iterator[Launch]:
        scene.interrupt()
        caches = list((scene.folder / "reference").glob("*.safetensors"))
        for path in caches:
            harm(path)
        yield scene.run()
        for path in caches:
            path.unlink()

    return cause


def cache_of_another_model(scene: Scene) -> Iterator[Launch]:
    """A finished pass of another model, under the name of this model's."""
    scene.interrupt()
    names = _caches_by_size(scene)
    shutil.rmtree(scene.folder)
    with changed(scene.root / "model"):
        toy_model(seed=99).save_pretrained(scene.root / "model")
        scene.interrupt()
    for rows, path in _caches_by_size(scene).items():
        path.rename(names[rows])
    shutil.rmtree(scene.folder / "checkpoints")
    (scene.folder / "metrics.jsonl").unlink()
    yield scene.run()
    for path in names.values():
        path.unlink()


def _caches_by_size(scene: Scene) -> dict[int, Path]:
    """The size differs between training and evaluation rows."""
    return {path.stat().st_size: path for path in (scene.folder / "reference").glob("*.safetensors")}


def bad_model(scene: Scene) -> Iterator[Launch]:
    with changed(scene.root / "model"):
        cut(scene.root / "model" / "model.safetensors")
        yield scene.run()


def bad_rows(scene: Scene) -> Iterator[Launch]:
    """The tokenised dataset of an interrupted run is cut in half."""
    scene.interrupt()
    for path in Path(f"{scene.folder}-rows").rglob("*.arrow"):
        cut(path)
    yield scene.run()


def changed_key(scene: Scene) -> Iterator[Launch]:
    scene.interrupt()
    yield scene.run("--dpo.beta=0.5")


def changed_data(scene: Scene) -> Iterator[Launch]:
    scene.interrupt()
    with changed(scene.root / "train-dpo.jsonl") as data:
        data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
        yield scene.run()


@contextlib.contextmanager
def changed(path: Path) -> Iterator[Path]:
    """Restore a file or a folder at the end."""
    kept = path.with_name("kept")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, kept)
    yield path
    (shutil.rmtree if path.is_dir() else os.remove)(path)
    kept.rename(path)


def with_hooks(*hooks: Hook) -> Cause:
    def cause(scene: Scene) -> Iterator[Launch]:
        yield scene.run(hooks=hooks)

    return cause


def not_a_number(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function returns is not a number."""
    result, nan = work(*arguments, **options), float("nan")
    if hasattr(result, "loss"):
        result.loss, result.per_example = result.loss * nan, result.per_example * nan
        return result
    if isinstance(result, list):
        result[0].mul_(nan)
        return result
    return result * nan


def stopped_rank(scene: Scene) -> Iterator[Launch]:
    """One rank hangs (SIGSTOP); the limit is a tenth of a minute. The launcher kills what hangs."""
    run = scene.start("--training.timeout_minutes=0.1")
    wait_until(lambda: bool(scene.checkpoints) or run.over(), LIMIT)
    send(run.pids[1:], signal.SIGSTOP)
    wait_until(lambda: run.codes()[0] is not None, 40)
    send(run.pids[1:], signal.SIGKILL)
    run.wait(LIMIT)
    yield run


def stopped_twice(scene: Scene) -> Iterator[Launch]:
    """A second signal in the middle of a long step."""
    run = scene.run_to(3, hooks=(before(STEP, functools.partial(time.sleep, 2)),))
    for _ in range(2):
        send(run.pids, signal.SIGTERM)
        time.sleep(1.2)
    run.wait(LIMIT)
    yield run


def wandb_run(*hooks: Hook, **environment: str) -> Cause:
    def cause(scene: Scene) -> Iterator[Launch]:
        settings = functools.partial(_set_environment, {"WANDB_SILENT": "true", **environment})
        yield scene.run("--tracking.wandb=true", hooks=(settings, *hooks))
        shutil.rmtree(scene.folder)

    return cause


def _set_environment(environment: dict[str, str], _rank: int) -> None:
    os.environ.update(environment)


def _fail() -> None:
    raise RuntimeError("a failure that was put here")


# ---- harm ----


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_logps(path: Path) -> None:
    """Flip the lowest bit of the first log-prob of a reference cache: it stays a plausible number."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[8 + size + json.loads(content[8 : 8 + size])["logps"]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# ---- what must be seen ----


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault and what must be seen of it.

    Attributes:
        name: of its row in the table.
        cause: breaks a run.
        words: that the message has.
        codes: exit codes of the ranks; None: any but 0.
        usual: caused without `--all-faults` too.
    """

    name: str
    cause: Cause
    words: tuple[str, ...] = ()
    codes: tuple[int, ...] | None = None
    usual: bool = False

    def as_expected(self, codes: list[int | None], message: str) -> bool:
        said = "Traceback" not in message and all(word in message for word in self.words)
        return said and (tuple(codes) == self.codes if self.codes is not None else not {0, None} & {*codes})


OK = (0, 0)
NO_SERVER = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
FAULTS = (
    Fault("kill -9 of one of two ranks", killed, ("error: ", "rank"), usual=True),
    Fault("kill -9 of torchrun itself", torchrun_killed),
    Fault("disk full: checkpoint", disk_full(SAVE), ("checkpoints", "free"), usual=True),
    Fault("disk full: reference cache", disk_full(REFERENCE), ("reference", "free")),
    Fault("disk full: export", disk_full(EXPORT), ("model", "free")),
    Fault("disk full: metrics", disk_full(STEP), ("metrics.jsonl", "free")),
    Fault("newest checkpoint: a bit flipped", bad_checkpoint(flip, "*.safetensors"), ("step-00000006",), OK, True),
    Fault("newest checkpoint: truncated", bad_checkpoint(cut, "*.safetensors"), ("step-00000006",), OK),
    Fault("newest checkpoint: a file missing", bad_checkpoint(Path.unlink, "*.safetensors"), ("step-00000006",), OK),
    Fault("newest checkpoint: state.json truncated", bad_checkpoint(cut, "state.json"), ("step-00000006",), OK),
    Fault("every checkpoint damaged", no_checkpoint_whole, ("no checkpoint is whole",)),
    Fault("reference cache: a bit flipped", bad_cache(flip_logps), ("error: the reference cache", "delete")),
    Fault("reference cache: truncated", bad_cache(cut), ("error: the reference cache", "delete")),
    Fault("reference cache of another model", cache_of_another_model, ("another model", "delete")),
    Fault("starting weights: truncated", bad_model, ("error: ", "model.safetensors")),
    Fault("tokenised dataset: truncated", bad_rows, codes=OK),
    Fault("a changed key on resume", changed_key, ("dpo.beta", "another config")),
    Fault("changed data on resume", changed_data, ("data.train", "resume=never")),
    Fault("NaN in the loss", with_hooks(around(LOSS, not_a_number)), ("step 1", "rows"), usual=True),
    Fault("NaN in a gradient", with_hooks(around(GRADIENTS, not_a_number)), ("step 1", "gradient")),
    Fault("NaN in the reference pass", with_hooks(around(REFERENCE_SCORES, not_a_number)), ("reference", "not finite")),
    Fault("a slow rank", with_hooks(before(STEP, functools.partial(time.sleep, 0.5), on=1)), codes=OK),
    Fault("a rank that hangs", stopped_rank, ("error: ",), (1, -9)),
    Fault("a second SIGTERM", stopped_twice, codes=(143, 143)),
    Fault("W&B unreachable", wandb_run(**NO_SERVER), ("warning: ",), OK),
    Fault("W&B fails in mid-run", wandb_run(before("wandb.sdk.wandb_run:Run.log", _fail), WANDB_MODE="offline"),
          ("warning: ",), OK),
    Fault("output folder read-only", read_only_disk, ("training.output_dir", "cannot be written")),
    Fault("output folder is a file", file_in_the_way, ("training.output_dir", "cannot be written"), usual=True),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_met_and_the_same_command_ends_as_an_undisturbed_run(fault, scene, measure, tables, pytestconfig):
    if not (fault.usual or pytestconfig.getoption("--all-faults", False)):
        pytest.skip("caused with --all-faults only")
    undisturbed: Undisturbed = measure(FULL)
    with contextlib.contextmanager(fault.cause)(scene) as broken:
        seconds, codes, message = time.monotonic() - broken.began, broken.codes(), _plain(broken.message(), scene)
        orphans = broken.end(1.0)
    again = scene.run()
    equal = digests(scene.folder / "model") == undisturbed.model and metrics(scene.folder) == undisturbed.metrics
    expected = fault.as_expected(codes, message) or fault.name == "kill -9 of torchrun itself"  # torch's own trace
    tables.setdefault(
        "Faults", "| fault | exit codes | what the user sees | seconds | recovered | expected |\n" + 6 * "|---" + "|"
    )
    cells = (
        fault.name,
        ", ".join(map(str, codes)),
        message.replace("|", "\\|"),
        f"{seconds:.1f}",
        str(equal),
        str(expected),
    )
    tables["Faults"] += f"\n| {' | '.join(cells)} |"
    assert expected, (codes, message)
    assert (orphans, again.codes(), equal) == ([], [0, 0], True), again.text()[-2000:]


def _plain(text: str, scene: Scene) -> str:
    """Without this machine's folders, and not longer than a cell may be."""
    plain = text.replace(str(scene.disk), "OUTPUT").replace(str(scene.root), "INPUT")
    return plain if len(plain) <= 400 else plain[:400] + " ..."
