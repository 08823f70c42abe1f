"""`benchmarks/gpu_run.py`: a short run on the CPU, and that it notices what differs."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu_run(benchmarks):
    return importlib.import_module("gpu_run")


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one_with_the_losses_of_fp32(tmp_path):
    command = [sys.executable, "benchmarks/gpu_run.py", "--cpu", "--cases", "dpo-lora", "--minutes", "6", "--seed", "3"]
    command += ["--output", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [check["name"] for check in found["checks"]] == [
        "the model and the data are made",
        "dpo-lora: runs to its end",
        "dpo-lora: killed and resumed, equal bit for bit",
        "dpo-lora: losses as on the CPU in fp32",
    ]
    assert all(check["passed"] for check in found["checks"])
    losses = found["losses"]["dpo-lora"]
    assert losses["bf16 here"] != losses["fp32 on the CPU"]
    assert losses["bf16 here"][0] == pytest.approx(0.693147, abs=1e-5)
    (step,) = found["killed_at_step"].values()
    assert 5 < step < 30
    assert "| largest difference |" in done.stdout


def _run_folder(folder, *, weights=b"w", loss=0.5, speed=1.0):
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    lines = [{"step": 1, "loss": 0.7, "pairs_per_second": speed}, {"step": 2, "loss": loss, "system/memory": speed}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_equal_but_for_their_timings(gpu_run, tmp_path):
    one = _run_folder(tmp_path / "one")
    assert gpu_run.difference(one, _run_folder(tmp_path / "two", speed=2.0)) is None
    assert gpu_run.difference(one, _run_folder(tmp_path / "three", weights=b"v")) == "model/model.safetensors differs"
    other = _run_folder(tmp_path / "four", loss=0.5000001)
    assert gpu_run.difference(one, other) == "step 2: loss is 0.5000001 in place of 0.5"
    (other / "metrics.jsonl").write_text('{"step": 1}\n')
    assert gpu_run.difference(one, other) == "1 lines of metrics in place of 2"
    (one / "model" / "model.safetensors").unlink()
    assert gpu_run.difference(one, _run_folder(tmp_path / "five")).endswith("model holds no file")


def test_losses_are_too_far_apart_at_the_worst_step(gpu_run):
    assert gpu_run.too_far([0.7, 0.6], [0.7, 0.61], 0.02) is None
    assert gpu_run.too_far([0.7, 0.6, 0.5], [0.7, 0.64, 0.51], 0.02).startswith(
        "step 2: 0.600000 and 0.640000, 4.00e-02"
    )
    assert gpu_run.too_far([0.7, float("nan")], [0.7, 0.6], 0.02).startswith("step 2")
    assert gpu_run.too_far([0.7], [0.7, 0.6], 0.02) == "1 losses beside 2"
    assert gpu_run.too_far([], [], 0.02) == "0 losses beside 0"


# A run of 30 steps that keeps a checkpoint every 5, and goes on from the newest unless it is told to begin anew.
ENTRY = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
path, done = folder / "metrics.jsonl", 0
if path.exists() and not ANEW:
    done = max(int(each.name[5:]) for each in (folder / "checkpoints").glob("step-*"))
lines = path.read_text().splitlines()[:done] if done else []
for step in range(done + 1, 31):
    lines.append(json.dumps({"step": step, "loss": 1 / step, "pairs_per_second": time.time()}))
    path.write_text("".join(line + chr(10) for line in lines))
    if step % 5 == 0:
        (folder / "checkpoints" / f"step-{step:08}").mkdir(exist_ok=True)
    time.sleep(PAUSE)
(folder / "model").mkdir(exist_ok=True)
(folder / "model" / "weights").write_text("same")
raise SystemExit(CODE)
"""


@pytest.fixture
def bench(gpu_run, monkeypatch, tmp_path):
    """A bench whose runs are `ENTRY`, with the values of `settings`."""
    settings = {"ANEW": False, "PAUSE": 0.02, "CODE": 0}

    def start(bench, case, name, *words, cpu=False):
        if time.time() > bench.end:
            raise gpu_run.OutOfTime("not run: out of time")
        entry = tmp_path / "entry.py"
        entry.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()) + ENTRY)
        (bench.scratch / f"{name}.log").write_text("boom\n")
        return subprocess.Popen([sys.executable, str(entry), str(bench.scratch / name)])

    monkeypatch.setattr(gpu_run, "start", start)
    found = gpu_run.Bench(tmp_path, tmp_path / "found.json", time.time() + 60, cpu=True, seed=1)
    found.settings = settings
    gpu_run.run(found, "dpo", "dpo-undisturbed")
    return found


def test_a_run_is_killed_after_its_first_checkpoint_and_resumed(gpu_run, bench):
    name = gpu_run.kill_and_resume(bench, "dpo")
    assert gpu_run.unlike(bench, "dpo", name) is None
    assert 5 < bench.report["killed_at_step"]["dpo-killed-0"] < 30
    until_first, until_end = (bench.report[key]["dpo-undisturbed"] for key in ("seconds_to_first_line", "seconds"))
    assert 0 < until_first < until_end - 25 * bench.settings["PAUSE"]


def test_what_matters_most_comes_first_as_time_may_run_out(gpu_run):
    assert list(gpu_run.CASES) == ["dpo", "dpo-lora", "sft"]


def test_a_run_that_begins_anew_is_not_resumed(gpu_run, bench):
    bench.settings["ANEW"] = True
    with pytest.raises(RuntimeError, match="the run began anew in place of resuming from its checkpoint"):
        gpu_run.kill_and_resume(bench, "dpo")


def test_a_run_that_cannot_be_killed_in_time_or_fails_is_told(gpu_run, bench, monkeypatch):
    bench.settings["PAUSE"] = 0.0
    monkeypatch.setattr(gpu_run, "checkpoints", lambda folder: [])
    assert not bench.check("a", lambda: gpu_run.kill_and_resume(bench, "dpo"))
    assert bench.report["checks"][-1]["message"].endswith("the run was over before it could be killed, 3 times")
    bench.settings["CODE"] = 3
    assert not bench.check("b", lambda: gpu_run.kill_and_resume(bench, "dpo"))
    assert bench.report["checks"][-1]["message"].endswith("exit code 3: boom")
    assert [check["passed"] for check in json.loads(bench.output.read_text())["checks"]] == [False, False]


def test_what_there_is_no_time_for_fails_and_keeps_what_was_found(gpu_run, bench):
    assert bench.check("before", lambda: None)
    bench.settings["PAUSE"] = 1.0
    bench.end = time.time() + 0.5
    assert not bench.check("stopped", lambda: str(gpu_run.run(bench, "dpo", "another")))
    assert not bench.check("not begun", lambda: str(gpu_run.run(bench, "dpo", "a third")))
    found = json.loads(bench.output.read_text())["checks"]
    messages = [None, "OutOfTime: another was stopped: out of time", "OutOfTime: not run: out of time"]
    assert [check["message"] for check in found] == messages


def test_without_datasets_one_line_says_what_to_do(gpu_run, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name: None)
    assert gpu_run.main(["--cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `datasets` is not installed")
