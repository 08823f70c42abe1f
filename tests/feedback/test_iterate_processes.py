"""Iterations whose stages are real processes: killed at random moments, and under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_iterations import Counting, tree, write_config, write_prompts, write_start

import notus.__main__ as entry
from notus.feedback import iterate
from notus.runtime.process import STOPPED

# More than in CI: NOTUS_ITERATION_KILLS=20 pytest -m slow tests/feedback/test_iterate_processes.py
KILLS = int(os.environ.get("NOTUS_ITERATION_KILLS", "2"))
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_iteration.py"


@pytest.mark.slow
def test_a_killed_iteration_makes_the_same_pairs_and_the_same_model(tmp_path):
    result = tmp_path / "result.json"
    words = ["--kills", str(KILLS), "--rounds", "1", "--seed", "3", "--folder", tmp_path / "in", "--output", result]
    subprocess.run([sys.executable, SCRIPT, *words], check=True)
    found = json.loads(result.read_text())
    assert len(found["kills"]) == KILLS
    assert found["files"] == 5  # prompts, records, ratings, pairs, and the model
    assert found["different"] == []


@pytest.mark.slow
def test_a_stage_under_torchrun(tmp_path, monkeypatch):
    """Sampling and rating on ranks have tests of their own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_start(tmp_path / "start")
    write_prompts(tmp_path / "prompts.txt", 6)
    changes = {"iterate__rounds": 1, "iterate__eval_prompts": None, "iterate__kl_samples": 0, "data__eval_size": 0}
    config = write_config(tmp_path / "c.yaml", tree(tmp_path, **changes))
    until_dpo = Counting(lambda words: STOPPED if words[0] == "dpo" else None)
    assert iterate.iterate([config], until_dpo) == STOPPED
    assert entry.main(["iterate", config, "--only", "dpo", "--round", "1", "--nproc-per-node=2"]) == 0
    environment = json.loads((tmp_path / "out" / "round-1" / "run" / "environment.json").read_text())
    assert environment["world_size"] == 2
