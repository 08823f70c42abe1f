"""Preemption as it happens: torchrun, its ranks, and the signals that schedulers send."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from ranks import free_port, launched, run_ranks
from runs import assert_same_run, settings, wait_until, write_pairs
from toys import toy_model_folder

from notus.config import load_config
from notus.runtime.process import STOPPED
from notus.training import dpo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    model, pairs = toy_model_folder(folder / "model"), write_pairs(folder / "pairs.jsonl", 24)
    path = folder / "config.yaml"
    tree = settings(folder / "run", model, pairs, training__epochs=40, training__save_every=20, training__log_every=7)
    path.write_text(yaml.safe_dump(tree))
    return path


def _launch(config: Path, run: Path, *options: str, ranks: int = 2, words: Sequence[str] = ()) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options] if ranks else []
    command = [sys.executable, *launcher, "train_dpo.py", str(config), f"--training.output_dir={run}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _wait_for_steps(run: Path, process: subprocess.Popen[str]) -> None:
    """Until some more lines of metrics are there."""
    metrics = run / "metrics.jsonl"
    before = _lines(metrics)
    wait_until(lambda: process.poll() is not None or _lines(metrics) >= before + 2)
    assert process.poll() is None, process.communicate()


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _ranks(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def _undisturbed(config: Path, run: Path, port: int) -> None:
    """A rank of the same launch, in a fork that need not import everything first."""
    with launched(port):
        assert dpo.run(load_config([str(config), f"--training.output_dir={run}"], "dpo")) == 0


def test_a_run_is_disturbed_three_times_and_ends_as_an_undisturbed_one(config_file: Path, tmp_path: Path) -> None:
    """torchrun is killed; it is told to stop; one of its ranks is. Each time the same command goes on.

    Each start of torchrun takes tens of seconds of imports, so one run has all three.
    """
    run = config_file.parent / "disturbed"
    first = _launch(config_file, run)
    _wait_for_steps(run, first)
    ranks = _ranks(first)
    first.kill()
    first.communicate(timeout=240)  # until the ranks, too, have let go of the pipes
    wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))  # ranks do not outlive torchrun
    assert (run / "checkpoints" / "latest").exists()  # and save when it is killed

    again = _launch(config_file, run)
    _wait_for_steps(run, again)
    ranks = _ranks(again)
    again.send_signal(signal.SIGTERM)
    out, told = again.communicate(timeout=240)
    assert again.returncode != 0
    assert "resuming from" in out
    assert "SIGTERM: stopping after this step" in told
    assert "everything is saved, and the same command resumes the run" in out
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)

    restarting = _launch(config_file, run, "--max-restarts=2")
    _wait_for_steps(run, restarting)
    os.kill(_ranks(restarting)[1], signal.SIGINT)
    out, told = restarting.communicate(timeout=240)
    assert restarting.returncode == 0, told
    assert "stopped by a signal after step" in out
    assert out.count("resuming from") == 2  # by the launch, and by torchrun's restart

    whole = config_file.parent / "undisturbed"
    run_ranks(_undisturbed, 2, tmp_path, config_file, whole, free_port())
    assert_same_run(run, whole)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_tokenisers_end_with_the_run_and_do_not_hold_its_folder(
    number: signal.Signals, config_file: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "many.jsonl", 60_000)
    run = tmp_path / "run"
    options = [f"--data.train={pairs}", "--data.num_workers=2", f"--data.cache_dir={tmp_path / 'cache'}"]
    process = _launch(config_file, run, ranks=0, words=options)
    deadline = time.monotonic() + 120
    while len(children := _children(process.pid)) < 2 or not list(tmp_path.glob("cache/.rows-*/whole/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=240)
    assert process.returncode == (STOPPED if number == signal.SIGTERM else -number)
    wait_until(lambda: not any(_alive(child) for child in children))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_signal_while_python_imports_is_a_preemption_too(config_file: Path, tmp_path: Path) -> None:
    process = _launch(config_file, tmp_path / "run", ranks=0)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():  # by then the entry is under way
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=240)
    assert process.returncode == STOPPED
    assert told.startswith("SIGINT: stopped ")
