"""configs/launch: the files parse, their commands are ones that torchrun and notus read, and jobs are requeued.

test_two_nodes.py trains by the script for several nodes.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import wait_until
from torch.distributed.run import get_args_parser

from notus import __main__ as entry
from notus.config import load_config

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "configs" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RECIPE = "configs/notus-7b-v1/dpo-full-8xa100-40gb.yaml"
# Stand-ins for the scheduler. Each srun runs its command once; `record` notes what a command was given.
STUBS = {
    "srun": 'exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "$@" >> requeued; fi',
    "scancel": 'echo "$@" > cancelled; kill -TERM "$(cat pid)"',
    "torchrun": f'exec {sys.executable} "$(dirname "$0")/record" "$@"',
}
RECORD = """
import json, os, signal, sys, time
json.dump({"words": sys.argv[1:], "environment": dict(os.environ)}, open("given", "w"))
ending = os.environ["ENDING"]
if ending.startswith("exit"):
    sys.exit(int(ending.split()[1]))
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(int(ending.split()[1]))))
open("pid", "w").write(str(os.getpid()))
time.sleep(60)
"""


def torchrun_arguments(words: list[str]) -> Any:
    """What torchrun reads; a mistake ends the test."""
    return get_args_parser().parse_args(words)


def check_training_command(arguments: Any) -> None:
    assert arguments.module
    assert arguments.training_script == "notus"
    task, *words = arguments.training_script_args
    load_config(words, task)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A working folder with the repository's configs, and the stand-ins in front of the PATH."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)
    (stubs / "record").write_text(RECORD)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    for name, value in {
        **job,
        "SLURM_ARRAY_JOB_ID": "123450",
        "SLURM_ARRAY_TASK_ID": "2",
        "PATH": f"{stubs}:{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(script: Path, ending: str, *words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["bash", script, *words], env={**os.environ, "ENDING": ending}, stderr=subprocess.PIPE)


def words_of(script: Path, folder: Path) -> list[str]:
    if script.name != "slurm-array.sh":
        return ["dpo", RECIPE, "--training.output_dir=runs/a b"]
    line = shlex.join(["torchrun", "-m", "notus", "dpo", RECIPE, "--training.output_dir=runs/a b"])
    (folder / "commands.txt").write_text(f"false\n{line}\n")
    return ["commands.txt"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_runs_torchrun_and_is_requeued_only_if_it_was_stopped(script, cluster):
    subprocess.run(["bash", "-n", script], check=True)
    words = words_of(script, cluster)
    job_id = "123450_2" if script.name == "slurm-array.sh" else "123456"  # not that of all tasks
    for code in (0, 1):
        assert submit(script, f"exit {code}", *words).wait(timeout=60) == code
    given = json.loads((cluster / "given").read_text())
    arguments = torchrun_arguments(given["words"])
    check_training_command(arguments)
    assert arguments.training_script_args == ["dpo", RECIPE, "--training.output_dir=runs/a b"]
    for code in (0, 1):
        (cluster / "pid").unlink(missing_ok=True)
        job = submit(script, f"stopped {code}", *words)
        wait_until(lambda: (cluster / "pid").exists() and (cluster / "pid").read_text())
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == code
        assert (cluster / "cancelled").read_text() == f"--signal=TERM {job_id}\n"
        assert (cluster / "requeued").exists() == (code == 1)
    assert (cluster / "requeued").read_text() == f"requeue {job_id}\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_requests_leaves_time_to_save(script):
    text = script.read_text()
    requests = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )
    assert requests["ntasks-per-node"] == "1"  # torchrun starts the others
    assert "requeue" in requests
    assert requests["open-mode"] == "append"
    warning = int(requests["signal"].removeprefix("B:USR1@"))
    (timeout,) = [int(line.split("=")[1].split()[0]) for line in text.splitlines() if "SHUTDOWN_TIMEOUT=" in line]
    assert 0 < timeout < warning


def test_several_nodes_meet_at_the_first(cluster):
    assert submit(LAUNCH / "slurm-several-nodes.sh", "exit 0", "dpo", RECIPE).wait(timeout=60) == 0
    given = json.loads((cluster / "given").read_text())
    arguments = torchrun_arguments(given["words"])
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert arguments.rdzv_backend == "c10d"
    assert arguments.rdzv_endpoint == "node7:23456"  # 20000 + 123456 % 20000
    assert arguments.rdzv_id == "123456"
    assert given["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_an_array_task_without_a_line_is_an_error(cluster):
    (cluster / "commands.txt").write_text("false\n")
    job = submit(LAUNCH / "slurm-array.sh", "exit 0", "commands.txt")
    assert job.communicate(timeout=60)[1] == b"error: commands.txt has no line 2\n"
    assert job.returncode == 1


@pytest.mark.parametrize("name", ["one", "several"])
def test_a_kubernetes_job_is_consistent(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    *services, job = yaml.safe_load_all(
        (LAUNCH / f"kubernetes-{name}-node{'s' * (name == 'several')}.yaml").read_text()
    )
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert container["command"][0] == "torchrun"
    arguments = torchrun_arguments(container["command"][1:])
    check_training_command(arguments)
    assert int(arguments.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy requires
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    if name == "one":
        assert arguments.standalone
        assert not services
        return
    (service,) = services
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["completionMode"] == "Indexed"
    assert int(arguments.nnodes) == spec["completions"] == spec["parallelism"]
    port = service["spec"]["ports"][0]["port"]
    assert arguments.rdzv_endpoint == f"{job['metadata']['name']}-0.{pod['subdomain']}:{port}"


def torchrun_lines(path: Path) -> list[str]:
    """The torchrun commands of a page or a config that run a command of ours."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"\btorchrun (--(?!standalone)[^`|\n]*? (?:-m notus|train_\w+\.py) [^`|\n]*)", text)


def test_the_torchrun_commands_of_the_docs_are_read_as_they_are_meant():
    """By torchrun, which takes what may be an abbreviation of its own options for one, and by the command."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    commands = set()
    for words in [shlex.split(line, comments=True) for page in pages for line in torchrun_lines(page)]:
        arguments = torchrun_arguments(words)
        script, rest = arguments.training_script, arguments.training_script_args
        assert [script, *rest] == words[words.index(script) :]
        assert script in ("notus", "train_dpo.py", "train_sft.py"), words
        if script == "notus":
            commands.add(rest[0])
            if rest[0] not in entry.TRAINING:
                entry._parse(rest)
    assert {"dpo", "sft", "evaluate", "sample", "rate"} <= commands


@pytest.mark.parametrize("command", ["sample", "rate", "generate", "evaluate"])
def test_torchrun_takes_no_option_of_a_command_for_its_own(command):
    parser = argparse.ArgumentParser()
    declare, _ = entry._load(command, [command])
    declare(parser)
    names = {name for action in parser._actions for name in action.option_strings}
    for name in names - {"--n"}:  # has another name, --num-samples
        words = [command, f"{name}=1", name, "1"]
        assert torchrun_arguments(["--nproc-per-node=2", "-m", "notus", *words]).training_script_args == words
