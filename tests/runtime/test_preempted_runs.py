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
from runs import assert_same_run, settings, wait_until, write_pairs
from toys import toy_model_folder

from notus.runtime.process import STOPPED

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


def _wait_for_steps(run: Path, launched: subprocess.Popen[str]) -> None:
    """Until some lines of metrics are there."""
    metrics = run / "metrics.jsonl"
    wait_until(lambda: launched.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 2))
    assert launched.poll() is None, launched.communicate()


def _ranks(launched: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started."""
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.fixture(scope="module")
def undisturbed(config_file: Path) -> Path:
    run = config_file.parent / "undisturbed"
    launched = _launch(config_file, run)
    _, told = launched.communicate(timeout=240)
    assert launched.returncode == 0, told
    return run


def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(config_file: Path, undisturbed: Path) -> None:
    run = config_file.parent / "preempted"
    launched = _launch(config_file, run)
    _wait_for_steps(run, launched)
    ranks = _ranks(launched)
    launched.send_signal(signal.SIGTERM)
    out, told = launched.communicate(timeout=240)
    assert launched.returncode != 0
    assert "SIGTERM: stopping after this step" in told
    assert "everything is saved, and the same command resumes the run" in out
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    again = _launch(config_file, run)
    out, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    assert "resuming from" in out
    assert_same_run(run, undisturbed)


def test_ranks_do_not_outlive_torchrun_and_save_when_it_is_killed(config_file: Path, undisturbed: Path) -> None:
    run = config_file.parent / "orphaned"
    launched = _launch(config_file, run)
    _wait_for_steps(run, launched)
    ranks = _ranks(launched)
    launched.kill()
    launched.communicate(timeout=240)  # until the ranks, too, have let go of the pipes
    wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    assert (run / "checkpoints" / "latest").exists()
    again = _launch(config_file, run)
    _, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    assert_same_run(run, undisturbed)


def test_torchrun_restarts_after_one_rank_was_told_to_stop(config_file: Path, undisturbed: Path) -> None:
    run = config_file.parent / "restarted"
    launched = _launch(config_file, run, "--max-restarts=2")
    _wait_for_steps(run, launched)
    os.kill(_ranks(launched)[1], signal.SIGINT)
    out, told = launched.communicate(timeout=240)
    assert launched.returncode == 0, told
    assert "stopped by a signal after step" in out
    assert "resuming from" in out
    assert_same_run(run, undisturbed)


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
    launched = _launch(config_file, run, ranks=0, words=options)
    deadline = time.monotonic() + 120
    while len(children := _children(launched.pid)) < 2 or not list(tmp_path.glob("cache/.rows-*/whole/*")):
        assert launched.poll() is None, launched.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launched.send_signal(number)
    launched.communicate(timeout=240)
    assert launched.returncode == (STOPPED if number == signal.SIGTERM else -number)
    wait_until(lambda: not any(_alive(child) for child in children))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_signal_while_python_imports_is_a_preemption_too(config_file: Path, tmp_path: Path) -> None:
    launched = _launch(config_file, tmp_path / "run", ranks=0)
    maps = Path(f"/proc/{launched.pid}/maps")
    while "libtorch" not in maps.read_text():  # by then the entry is under way
        assert launched.poll() is None, launched.communicate()
        time.sleep(0.005)
    launched.send_signal(signal.SIGINT)
    _, told = launched.communicate(timeout=240)
    assert launched.returncode == STOPPED
    assert told.startswith("SIGINT: stopped ")
