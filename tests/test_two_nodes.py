"""Two torchrun agents on one machine, as on two nodes, train by hybrid sharding; one is lost and returns."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from ranks import free_port
from runs import read_metrics, settings, wait_until, write_pairs
from safetensors.torch import load_file
from toys import toy_model_folder

ROOT = Path(__file__).resolve().parents[1]
STEPS = 40
# torchrun's own waits are made for large machines; these find a lost node within seconds.
QUICK = "join_timeout=120,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
# The entry, but slow enough to be killed between two checkpoints.
SLOW = """
import sys, time
from notus.config import load_config
from notus.runtime.process import leave, run_entry
from notus.training import dpo
inner = dpo.DPOTask.row_loss
dpo.DPOTask.row_loss = lambda *arguments: time.sleep(0.1) or inner(*arguments)
leave(run_entry(lambda: dpo.run(load_config(sys.argv[1:], "dpo"))))
"""
# What stands in for the scheduler of configs/launch/slurm-several-nodes.sh: an agent for each of two nodes.
STUBS = {
    "srun": 'for node in 0 1; do "$@" & done; wait -n && wait -n',
    "scontrol": "echo 127.0.0.1",
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}
Start = Callable[[Path, Path, int], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a node's agent in a session of its own, with the entry, the config and the rendezvous' port."""
    log = (tmp_path / "log").open("wb")

    def agent(entry: Path, config: Path, port: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=nodes", f"--rdzv-conf={QUICK}",
            "--local-addr=127.0.0.1", str(entry), str(config),
        ]  # fmt: skip
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        environment = {**os.environ, **own, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    yield agent
    for pid in _processes(tmp_path):
        os.kill(pid, signal.SIGKILL)
    print((tmp_path / "log").read_text())


def _train_by_slurm_script(folder: Path, config: Path, port: int) -> int:
    """Run the script as a job of two nodes and return its exit code; `port`: 20000 to 39999."""
    (folder / "bin").mkdir()
    for name, body in STUBS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(port), "SLURM_JOB_NODELIST": "", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    own = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **job, **own, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    words = ["bash", str(ROOT / "configs/launch/slurm-several-nodes.sh"), "dpo", str(config)]
    return subprocess.run(words, env=environment, timeout=180, check=False).returncode


def _processes(folder: Path) -> dict[int, int]:
    """The processes that have a file of `folder` on their command line, and their parents."""
    lines = subprocess.check_output(["ps", "-ewwo", "pid=,ppid=,args="], text=True).splitlines()
    return {int(line.split()[0]): int(line.split()[1]) for line in lines if f"{folder}/" in line}


def _wait_for_rendezvous(port: int) -> None:
    """Whichever agent binds the port first keeps the rendezvous, so the node that is to stay must have bound it."""

    def is_open() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(is_open)


def test_a_node_is_lost_and_returns(tmp_path: Path, start: Start) -> None:
    model, pairs = toy_model_folder(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 8)
    for name in ("whole", "lost"):
        more = {"training__epochs": STEPS // 2, "training__save_every": 5, "training__sharding": "hybrid"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings(tmp_path / name, model, pairs, **more)))
    # the script's port is 20000 + the job's id % 20000
    port = next(port for port in iter(free_port, None) if 20000 <= port < 40000)
    assert _train_by_slurm_script(tmp_path, tmp_path / "whole.yaml", port) == 0

    (tmp_path / "slow.py").write_text(SLOW)
    launch = (tmp_path / "slow.py", tmp_path / "lost.yaml", free_port())
    first = start(*launch)
    _wait_for_rendezvous(launch[-1])
    second = start(*launch)
    wait_until((tmp_path / "lost" / "checkpoints" / "step-00000010").exists)
    workers = [pid for pid, parent in _processes(tmp_path).items() if parent == second.pid]
    assert len(workers) == 1
    for pid in (second.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    returned = start(*launch)
    assert [agent.wait(timeout=180) for agent in (first, returned)] == [0, 0]

    assert "resuming from" in (tmp_path / "log").read_text()
    assert not _processes(tmp_path), "orphans are left"
    whole, lost = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "lost"))
    assert all(torch.equal(whole[key], lost[key]) for key in whole)
    lines = [[(line["step"], line["loss"]) for line in read_metrics(tmp_path / name)] for name in ("whole", "lost")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == STEPS
