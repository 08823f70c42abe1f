"""A short run of `benchmarks/faults.py`, and that it notices a loss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]


def test_runs_that_are_killed_or_stopped_end_as_undisturbed_ones(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/faults.py", "--kills=3", "--terms=2", f"--results={tmp_path / 'found.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    trials = json.loads((tmp_path / "found.json").read_text())["trials"]
    assert [trial["case"] for trial in trials] == ["dpo-full", "dpo-lora", "sft-full", "dpo-full", "dpo-lora"]
    assert all(trial["completed"] and not trial["losses"] and trial["phases"] for trial in trials)
    assert "| all | 5 |" in done.stdout
    assert "5 of 5 | 5 of 5 | 0 | 0 |" in done.stdout


def test_what_is_not_whole_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from fault_kills import unwhole
    from fault_runs import Undisturbed, digests, tensor_digests

    step, reference, model = (tmp_path / name for name in ("checkpoints/step-00000003", "reference", "model"))
    for folder in (step, reference, model):
        folder.mkdir(parents=True)
        save_file({"a": torch.arange(9.0)}, folder / "a.safetensors", {"x": "1", "y": "2"})
    (step / "state.json").write_text("{}")
    measure = Undisturbed(1.0, digests(model), {step.name: tensor_digests(step)}, [], tensor_digests(reference))
    assert unwhole(tmp_path, measure) == []
    for folder in (step, reference, model):
        file = folder / "a.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    assert unwhole(tmp_path, measure) == [f"checkpoints/{step.name}", "reference/a.safetensors", "model"]
