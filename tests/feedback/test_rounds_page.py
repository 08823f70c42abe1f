"""What docs/rounds.md and the starting config show works."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from notus.feedback.settings import load_settings
from notus.feedback.stages import NAMES, plan

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "own-feedback" / "iterate.yaml"
PAGE = (ROOT / "docs" / "rounds.md").read_text(encoding="utf-8")

# Prints its arguments to a file, and the number of its job.
SBATCH = """#!/bin/bash
printf '%q ' "$@" >> jobs.txt
echo >> jobs.txt
wc -l < jobs.txt
"""


def test_the_starting_config_is_valid():
    settings = load_settings([str(CONFIG)])
    assert {stage.name for stage in plan(settings)} == set(NAMES) - {"own-pairs"}
    assert settings.dpo(1).lora.rank == 16


def test_the_page_has_every_stage():
    assert re.findall(r"^\| ([\w-]+) \| (?:`notus|\|)", PAGE, re.MULTILINE) == list(NAMES)


def test_the_schedulers_script_submits_every_stage_after_the_one_before(tmp_path):
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "sbatch" in block]
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    jobs = [shlex.split(line) for line in (tmp_path / "jobs.txt").read_text().splitlines()]
    after = [next((word for word in job if word.startswith("--dependency")), None) for job in jobs]
    assert after == [None, *(f"--dependency=afterok:{number}" for number in range(1, len(jobs)))]
    commands = [shlex.split(job[-1].removeprefix("--wrap=")) for job in jobs]
    submitted = [(int(words[-3]), words[words.index("--only") + 1]) for words in commands[:-1]]
    assert submitted == [(stage.round, stage.name) for stage in plan(load_settings([str(CONFIG)]))]
    assert {words[2] for words in commands[:-1]} == {"configs/own-feedback/iterate.yaml"}
    assert commands[-1] == ["notus", "report", load_settings([str(CONFIG)]).given("training.output_dir")]
    trains = [job for job in jobs if "--only dpo" in job[-1]]
    assert all("--partition=training" in job for job in trains)
