"""Iterations whose stages are real processes: killed at random moments, and under torchrun."""

import importlib
import json
import os

import pytest
from toy_iterations import tree, write_config, write_prompts, write_start

import notus.__main__ as entry
from notus.feedback.rounds import read_round

# More than in CI: NOTUS_ITERATION_KILLS=20 pytest -m slow tests/feedback/test_iterate_processes.py
KILLS = int(os.environ.get("NOTUS_ITERATION_KILLS", "2"))


@pytest.mark.slow
def test_a_killed_iteration_makes_the_same_pairs_and_the_same_model(tmp_path, benchmarks):
    found = importlib.import_module("kill_iteration").measure(tmp_path, kills=KILLS, rounds=1, seed=3)
    assert len(found["kills"]) == KILLS
    assert found["files"] == 5  # prompts, records, ratings, pairs, and the model
    assert found["different"] == []


@pytest.mark.slow
def test_a_round_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_start(tmp_path / "start")
    write_prompts(tmp_path / "prompts.txt", 6)
    changes = {"iterate__rounds": 1, "iterate__eval_prompts": None, "iterate__kl_samples": 0, "data__eval_size": 0}
    config = write_config(tmp_path / "c.yaml", tree(tmp_path, **changes))
    assert entry.main(["iterate", config, "--nproc-per-node=2"]) == 0
    found = read_round(tmp_path / "out" / "round-1")
    assert found.prompts == 6
    assert found.pairs is not None
    environment = json.loads((tmp_path / "out" / "round-1" / "run" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
