"""Two ranks of a run, of which one is killed, stopped, slowed, or fails."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from ranks import free_port
from runs import read_metrics, settings, wait_until
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
# The entry, with what DELAY says before each row's loss on rank 1, and a mark when the first step is done.
WORKER = """
import os, sys, time
from notus.config import load_config
from notus.runtime.process import leave, run_entry
from notus.training import dpo
inner = dpo.DPOTask.row_loss
def row_loss(*arguments):
    if os.environ["RANK"] == "1":
        exec(os.environ["BEFORE"])
    return inner(*arguments)
dpo.DPOTask.row_loss = row_loss
leave(run_entry(lambda: dpo.run(load_config(sys.argv[1:], "dpo"))))
"""
Launch = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def launch(tmp_path: Path, model_folder: Path, pairs_file: Path) -> Iterator[Launch]:
    """Start two ranks of a run in `tmp_path/name`, each a process without a launcher; all are ended afterwards."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "worker.py").write_text(WORKER)

    def start(name: str, before: str = "pass", **overrides: object) -> list[subprocess.Popen[str]]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings(tmp_path / name, model_folder, pairs_file, **overrides)))
        launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "BEFORE": before}
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for rank in range(2):
            command = [sys.executable, str(tmp_path / "worker.py"), str(path)]
            environment = {**os.environ, **launched, **fixed, "RANK": str(rank)}
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-2:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _wait_for_steps(folder: Path, steps: int) -> None:
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= steps)


LONG = {"training__epochs": 100_000, "training__save_every": 1_000_000}


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 keeps the store, if torchrun does not
def test_a_killed_rank_is_named_and_the_other_ends(rank: int, launch: Launch, tmp_path: Path) -> None:
    ranks = launch("run", **LONG)
    _wait_for_steps(tmp_path / "run", 2)
    ranks[rank].kill()
    _, told = ranks[1 - rank].communicate(timeout=240)  # not the 30 minutes of the default timeout
    assert ranks[1 - rank].returncode == 1
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: lost contact with other ranks: rank {rank}")
    assert " is gone or stopped (" in line
    assert "Traceback" not in told


def test_a_stopped_rank_is_named_after_the_timeout(launch: Launch, tmp_path: Path) -> None:
    left, stuck = launch("run", **LONG, training__timeout_minutes=0.25)
    _wait_for_steps(tmp_path / "run", 2)
    stuck.send_signal(signal.SIGSTOP)
    _, told = left.communicate(timeout=240)
    assert left.returncode == 1
    assert "error: lost contact with other ranks: rank 1 (" in told
    assert ") is gone or stopped (" in told
    assert "Traceback" not in told


def test_a_rank_that_hangs_but_lives_is_told_apart(launch: Launch, tmp_path: Path) -> None:
    left, _ = launch("run", "time.sleep(1000)", **LONG, training__timeout_minutes=0.25)
    _, told = left.communicate(timeout=240)
    assert left.returncode == 1
    assert ") is alive, but did not arrive in time (" in told


def test_a_rank_that_failed_is_named_with_its_error(launch: Launch, tmp_path: Path) -> None:
    left, failed = launch("run", "raise OSError('its disk is gone')", **LONG)
    _, told = left.communicate(timeout=240)
    assert (left.returncode, failed.wait()) == (1, 1)
    assert ") ended: OSError: its disk is gone (" in told


def test_a_bug_keeps_its_traceback(launch: Launch, tmp_path: Path) -> None:
    _, failed = launch("run", "raise RuntimeError('a bug')", **LONG)
    _, told = failed.communicate(timeout=240)
    assert "Traceback" in told
    assert "RuntimeError: a bug" in told


def test_a_slow_rank_is_waited_for(launch: Launch, tmp_path: Path) -> None:
    for name, before in (("even", "pass"), ("slow", "time.sleep(1)")):
        ranks = launch(name, before, training__timeout_minutes=0.25)
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    even, slow = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("even", "slow"))
    assert all(torch.equal(even[name], slow[name]) for name in even)
    speeds = [read_metrics(tmp_path / name)[-1]["pairs_per_second"] for name in ("even", "slow")]
    assert speeds[1] < speeds[0]
