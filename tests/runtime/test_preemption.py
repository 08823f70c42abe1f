import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import wait_until

from notus.runtime.preemption import Interrupted, Stop


def test_a_signal_in_the_loop_is_a_request(capfd: pytest.CaptureFixture[str]) -> None:
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    with stop.listening(), stop.in_loop():
        assert not stop.signalled
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what the scheduler sent to every process
        wait_until(lambda: stop.signalled)
        assert stop.signalled
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert capfd.readouterr().err.count("SIGTERM: stopping after this step") == 1


def test_a_budget_counts_from_the_launch() -> None:
    assert not Stop().overdue
    assert not Stop(max_hours=1.0).overdue
    stop = Stop(max_hours=1e-6)
    time.sleep(0.01)  # 3.6 ms are over
    assert stop.overdue


_SCRIPT = """
import os, signal, sys, time
from notus.runtime.preemption import Stop
stop = Stop()
with stop.listening():
    if sys.argv[1] == "setup":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    with stop.in_loop():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        print("still here", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
"""


@pytest.mark.parametrize(
    ("phase", "code", "said"),
    [
        ("setup", 75, "SIGINT: stopped outside the training steps"),
        ("loop", 128 + signal.SIGTERM, "SIGTERM again: stopped at once"),
    ],
)
def test_what_ends_the_process_at_once(phase: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT, phase], capture_output=True, text=True, timeout=240)
    assert done.returncode == code
    assert said in done.stderr
    assert ("still here" in done.stdout) == (phase == "loop")


def test_a_forked_process_ends_as_usual_and_its_signals_are_not_ours() -> None:
    stop = Stop()
    with stop.listening(), stop.in_loop():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        time.sleep(0.2)
        assert not stop.signalled


def _check_on_ranks(folder: Path) -> None:
    stop = Stop()
    stop.check()
    with stop.listening(), stop.in_loop():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: stop.signalled)
        dist.barrier()
        with pytest.raises(Interrupted):  # on both
            stop.check()
    (folder / f"rank{dist.get_rank()}").touch()


def test_one_ranks_request_is_heard_by_all(tmp_path: Path) -> None:
    run_ranks(_check_on_ranks, 2, tmp_path, tmp_path)
    assert (tmp_path / "rank0").exists()
    assert (tmp_path / "rank1").exists()


def test_the_budget_interrupts_nothing(device: torch.device) -> None:
    """An evaluation longer than the budget would else never end."""
    Stop(max_hours=1e-9).check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_within_a_program_a_signal_is_a_request_and_goes_to_the_earlier_handler_at_the_end(number: int) -> None:
    stop, seen = Stop(), []
    before = signal.signal(number, lambda found, _: seen.append(found))
    own = signal.getsignal(number)
    try:
        with stop.asking():
            signal.raise_signal(number)  # outside the loop there is nothing to save
            assert seen == [number]
            with stop.in_loop():
                signal.raise_signal(number)
                assert stop.signalled
                signal.raise_signal(number)  # what a launcher passes on at once is the same request
                assert seen == [number]
        assert seen == [number, number]
        assert signal.getsignal(number) is own
        with pytest.raises(ValueError, match="of the body"), stop.asking():
            raise ValueError("of the body")
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)
