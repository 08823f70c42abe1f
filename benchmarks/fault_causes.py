"""Every fault, really caused. A cause yields the broken run once it has ended, and takes the cause away at its end."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault_ranks import Launch, call, ranks_of, send, wait_until
from fault_runs import make_model
from fault_scene import LIMIT, Scene, ahead_of, cut, damage, instead, read_only

Cause = Callable[[Scene], "contextlib.AbstractContextManager[Launch]"]


@contextlib.contextmanager
def killed(scene: Scene) -> Iterator[Launch]:
    run = scene.run_to(3)
    send(run.pids[1:], signal.SIGKILL)
    run.wait(LIMIT)
    yield run


@contextlib.contextmanager
def torchrun_killed(scene: Scene) -> Iterator[Launch]:
    """Nobody is left to end the ranks; they must not train on beside the next launch."""
    run = scene.start(torchrun=True, ranks=2)
    wait_until(lambda: (scene.folder / "metrics.jsonl").exists() or run.over(), LIMIT)
    ranks = ranks_of(run)
    send(run.pids, signal.SIGKILL)
    wait_until(lambda: run.over() and not any(Path(f"/proc/{pid}").exists() for pid in ranks), 20)
    yield run


def disk_full(target: str) -> Cause:
    """The disk is full from the first call of `module:function` on."""

    @contextlib.contextmanager
    def cause(scene: Scene) -> Iterator[Launch]:
        yield scene.run(before=ahead_of(target, scene.fill))
        scene.empty()

    return cause


def bad_checkpoint(harm: Callable[[Path], None], pattern: str, count: int = 1) -> Cause:
    """The newest checkpoints of an interrupted run are harmed; nothing takes that away."""

    @contextlib.contextmanager
    def cause(scene: Scene) -> Iterator[Launch]:
        scene.interrupted()
        for path in scene.checkpoints()[:count]:
            harm(next(path.glob(pattern)))
        yield scene.run()

    return cause


@contextlib.contextmanager
def no_checkpoint_whole(scene: Scene) -> Iterator[Launch]:
    scene.interrupted()
    for path in scene.checkpoints():
        damage(next(path.glob("*.safetensors")))
    yield scene.run()
    shutil.rmtree(scene.folder)


def bad_cache(harm: Callable[[Path], None]) -> Cause:
    """A reference cache of an interrupted run is harmed; the remedy is to delete it."""

    @contextlib.contextmanager
    def cause(scene: Scene) -> Iterator[Launch]:
        scene.interrupted()
        caches = list((scene.folder / "reference").glob("*.safetensors"))
        for path in caches:
            harm(path)
        yield scene.run()
        for path in caches:
            path.unlink()

    return cause


@contextlib.contextmanager
def cache_of_another_model(scene: Scene) -> Iterator[Launch]:
    """A finished pass of another model, under the name of this model's."""
    own = scene.root / "model"
    other = scene.root / "other"
    call(lambda: make_model(other, 99), scene.root / "other.log")
    scene.interrupted()
    names = _caches_by_rows(scene)
    shutil.rmtree(scene.folder)
    own.rename(scene.root / "kept")
    other.rename(own)
    scene.interrupted()
    others = _caches_by_rows(scene)
    shutil.rmtree(own)
    (scene.root / "kept").rename(own)
    shutil.rmtree(scene.folder / "checkpoints")
    (scene.folder / "metrics.jsonl").unlink()
    for rows, path in others.items():
        path.rename(names[rows])
    yield scene.run()
    for path in names.values():
        path.unlink()


def _caches_by_rows(scene: Scene) -> dict[int, Path]:
    """By their size, which differs between training and evaluation rows."""
    return {path.stat().st_size: path for path in (scene.folder / "reference").glob("*.safetensors")}


def bad_model(harm: Callable[[Path], None]) -> Cause:
    """The weights that the run starts from are harmed."""

    @contextlib.contextmanager
    def cause(scene: Scene) -> Iterator[Launch]:
        weights = scene.root / "model" / "model.safetensors"
        content = weights.read_bytes()
        harm(weights)
        yield scene.run()
        weights.write_bytes(content)

    return cause


@contextlib.contextmanager
def bad_rows(scene: Scene) -> Iterator[Launch]:
    """The tokenised dataset of an interrupted run is cut in half."""
    scene.interrupted()
    for path in Path(f"{scene.folder}-rows").rglob("*.arrow"):
        cut(path)
    yield scene.run()
    shutil.rmtree(f"{scene.folder}-rows")


@contextlib.contextmanager
def changed_key(scene: Scene) -> Iterator[Launch]:
    scene.interrupted()
    yield scene.run("--dpo.beta=0.5")


@contextlib.contextmanager
def changed_data(scene: Scene) -> Iterator[Launch]:
    scene.interrupted()
    data, kept = scene.root / "train-dpo.jsonl", scene.root / "kept.jsonl"
    data.rename(kept)
    data.write_text("".join(reversed(kept.read_text().splitlines(keepends=True))))
    yield scene.run()
    kept.replace(data)


def poisoned(target: str) -> Cause:
    """What `module:function` returns is not a number, in one rank."""

    def spoil(result: Any) -> Any:
        if hasattr(result, "loss"):
            result.loss, result.per_example = result.loss * float("nan"), result.per_example * float("nan")
            return result
        if isinstance(result, list):
            result[0].mul_(float("nan"))
            return result
        return result * float("nan")

    @contextlib.contextmanager
    def cause(scene: Scene) -> Iterator[Launch]:
        yield scene.run(before=instead(target, spoil, on=0))

    return cause


@contextlib.contextmanager
def slow_rank(scene: Scene) -> Iterator[Launch]:
    yield scene.run(before=ahead_of("notus.training.trainer:Trainer._step", lambda: time.sleep(0.5), on=1))


@contextlib.contextmanager
def stopped_rank(scene: Scene) -> Iterator[Launch]:
    """One rank hangs (SIGSTOP); the limit is a tenth of a minute. The launcher kills what hangs."""
    run = scene.start("--training.timeout_minutes=0.1")
    wait_until(lambda: bool(scene.checkpoints()) or run.over(), LIMIT)
    send(run.pids[1:], signal.SIGSTOP)
    wait_until(lambda: run.codes()[0] is not None, 40)
    send(run.pids[1:], signal.SIGKILL)
    run.wait(LIMIT)
    yield run


@contextlib.contextmanager
def stopped_twice(scene: Scene) -> Iterator[Launch]:
    """A second signal in the middle of a long step."""
    run = scene.run_to(3, before=ahead_of("notus.training.trainer:Trainer._step", lambda: time.sleep(2)))
    send(run.pids, signal.SIGTERM)
    time.sleep(1.2)
    send(run.pids, signal.SIGTERM)
    run.wait(LIMIT)
    yield run


@contextlib.contextmanager
def wandb_unreachable(scene: Scene) -> Iterator[Launch]:
    """A key is set, and nothing listens where the server should be."""
    away = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"}
    yield scene.run("--tracking.wandb=true", before=lambda _: os.environ.update(away))
    shutil.rmtree(scene.folder)


@contextlib.contextmanager
def wandb_fails(scene: Scene) -> Iterator[Launch]:
    """Every call to log fails, in a run that is offline."""

    def refuse() -> None:
        raise RuntimeError("a failure that was put here")

    def prepare(rank: int) -> None:
        os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
        ahead_of("wandb.sdk.wandb_run:Run.log", refuse)(rank)

    yield scene.run("--tracking.wandb=true", before=prepare)
    shutil.rmtree(scene.folder)


@contextlib.contextmanager
def read_only_disk(scene: Scene) -> Iterator[Launch]:
    with read_only(scene.disk):
        run = scene.run()
    yield run


@contextlib.contextmanager
def file_in_the_way(scene: Scene) -> Iterator[Launch]:
    scene.folder.write_text("a file")
    yield scene.run()
    scene.folder.unlink()
