"""Small runs of `benchmarks/vs_trl.py` and `vs_trl_sweep.py`: Notus alone, as TRL is not among the tests' packages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def run(script: str, *options: object) -> str:
    command = [sys.executable, f"benchmarks/{script}", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sweep_of_notus_alone(tmp_path: Path) -> None:
    sizes = ["--ratios", "3:1", "--lengths", 32, "--tokens", 128, "--batch-size", 2]
    shown = run("vs_trl_sweep.py", "--sides", "notus", "trl-liger", *sizes, "--results", tmp_path / "found.json")
    results = json.loads((tmp_path / "found.json").read_text())
    [point] = results["points"]
    assert (point["prompt"], point["completion"], point["num_pairs"]) == (24, 8, 2)
    [losses], [seconds] = point["sides"]["notus"]["losses"], point["sides"]["notus"]["step_seconds"]
    assert len(losses) == len(seconds) == 3
    # the reference pass is counted in all, and in no step
    assert point["sides"]["notus"]["seconds"][0] > sum(seconds)
    assert point["sides"]["notus"]["steady_pairs_per_second"] == pytest.approx(4 / (seconds[1] + seconds[2]))
    assert list(results["not_run"]) == ["trl-liger"]
    assert "trl-liger: not run" in shown
    assert "| 24 | 8 | 2 |" in shown


def side(rate: float, losses: list[float], difference: float) -> dict[str, Any]:
    return {
        "pairs_per_second": rate,
        "steady_pairs_per_second": 2 * rate,
        "above_imports_mib": 100 * rate,
        "loss_difference": difference,
        "losses": [losses],
    }


def stored() -> dict[str, Any]:
    """Two points; Notus has 4 and 6 pairs per second, TRL 2 and 1."""
    points = [
        {
            "ratio": ratio,
            "length": 100,
            "prompt": prompt,
            "completion": 100 - prompt,
            "num_pairs": 8,
            "sides": {"notus": side(mine, [0.7, 0.5], 0.0), "trl": side(other, [0.7, 0.5], 2e-6)},
        }
        for ratio, prompt, mine, other in (("1:4", 20, 4.0, 2.0), ("4:1", 80, 6.0, 1.0))
    ]
    return {
        "machine": "CPU, 2 threads",
        "not_run": {"trl-liger": "no CUDA"},
        "settings": {"size": "15m", "precision": "fp32", "epochs": 3, "batch_size": 4, "spread": 0.0},
        "points": points,
    }


def test_the_table_of_stored_results() -> None:
    from sweep_report import table

    lines = table(stored()).splitlines()
    assert lines[:2] == [
        "15m parameters, fp32, epochs: 3, 4 pairs per step, spread of the lengths: 0.0; CPU, 2 threads",
        "trl-liger: not run (no CUDA)",
    ]
    assert lines[5] == "| 20 | 80 | 8 | 4.00 | 2.00 | 2.0x | 2.0x | 2.00x | 2.0e-06 of 2.0e-01 |"
    assert lines[6] == "| 80 | 20 | 8 | 6.00 | 1.00 | 6.0x | 6.0x | 6.00x | 2.0e-06 of 2.0e-01 |"


def test_the_plot_of_stored_results_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="only the benchmarks' plot needs matplotlib")
    (tmp_path / "stored.json").write_text(json.dumps(stored()))
    for name in ("a.svg", "b.svg"):
        run("vs_trl_sweep.py", "--stored", tmp_path / "stored.json", "--plot", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert "prompt + completion: 100 tokens" in drawn
    assert all(f">{label}<" in drawn for label in ("1:4", "4:1", "2.0", "6.0", "trl"))


def test_made_pairs_have_the_lengths_asked_for(tmp_path: Path) -> None:
    from synthetic_pairs import make_pairs
    from vs_trl_sweep import longest_pair, split

    assert split("4:1", 1000) == (800, 200)
    pairs = tmp_path / "pairs.jsonl"
    make_pairs(pairs, 3, seed=0, prompt=80, completion=20, spread=0.0)
    # <s> and </s> are of the 80 and the 20
    assert {len(json.loads(line)["prompt"].split()) for line in pairs.read_text().splitlines()} == {79}
    assert longest_pair(pairs) == 80 + 20 + 20
    make_pairs(pairs, 2, seed=0, prompt=1500, completion=600, spread=0.0)
    with pytest.raises(SystemExit, match="2100 tokens, the model 2048 positions"):
        longest_pair(pairs)


@pytest.mark.parametrize(("size", "millions"), [("15m", 15.6), ("100m", 100.1), ("1b", 1100.0)])
def test_a_made_model_is_as_large_as_it_says(size: str, millions: float) -> None:
    from synthetic_setup import model_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(size))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def outcome(losses: list[float], step_seconds: list[float], ids: str = "x") -> Any:
    from job import Outcome

    seconds = sum(step_seconds) + 1
    return Outcome(
        seconds, 1.0, seconds + 1, losses, step_seconds, 100.0, 400.0, "CPU", [[3, 2, 1, ids], [3, 2, 1, ids]]
    )


def comparison(other: Any) -> Any:
    """Two sides, two steps of one pair each; a reference pass of a second ahead."""
    from job import Machine
    from notus.model.arithmetic import Dimensions
    from report import Comparison, Measured

    runs = [Measured("notus", 1, outcome([0.69, 0.6], [3.0, 0.5])), Measured("trl", 1, other)]
    machine = Machine(1e3, Dimensions(layers=1, attention_width=2, body_weights=10, head_weights=5), 20, "CPU")
    return Comparison(runs, [machine], num_pairs=2, batch_size=1)


def test_what_is_counted() -> None:
    both = comparison(outcome([0.69, 0.6], [4.0, 1.0]))
    assert both.speed("notus", 1) == pytest.approx(2 / 4.5)  # the reference pass and the first step are in it
    assert both.steady("notus", 1) == pytest.approx(1 / 0.5)
    # A = 3*4/2 + (2*3 + 2*3/2) + (1*3 + 1*2/2) = 19; forward = 2*10*6 + 2*5*3 + 4*1*2*19 = 302;
    # two pairs, forward + backward + reference = 4 forwards: 2416 operations in 4.5 seconds at 1000 a second
    assert both.share("notus", 1) == pytest.approx(2.416 / 4.5)


def test_sides_that_did_other_work_are_found() -> None:
    from report import check_losses, check_tokens

    good = comparison(outcome([0.69, 0.6005], [1.0, 1.0]))
    assert check_tokens(good, 10) == check_losses(good, 1e-3) == []
    assert "differ by more than 0.0001" in check_losses(good, 1e-4)[0]
    assert "differ" in check_losses(comparison(outcome([0.69, float("nan")], [1.0, 1.0])), 1e-3)[0]
    assert "pair 1" in check_tokens(comparison(outcome([0.69, 0.6], [1.0, 1.0], ids="y")), 10)[0]
    assert "longer than --max-length 4" in check_tokens(good, 4)[0]
