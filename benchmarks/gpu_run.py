"""DPO, DPO with LoRA and SFT in bf16 through the real entries, each killed once, and beside the same runs on the CPU.

    python benchmarks/gpu_run.py [--minutes 8] [--output FILE.json] [--cases dpo dpo-lora sft]
    python benchmarks/gpu_run.py --cpu        # the run in bf16 is on the CPU as well

A model of about 1M parameters and the demo's data are made first. Then, for each case:

1. A run is left alone. Beside it the same run is killed (SIGKILL) at a random step after its first checkpoint and
   started again with the same command. With `training.deterministic` both must have the same metrics and weights, bit
   for bit.
2. The losses of all steps are compared with those of the same run on the CPU, in bf16 and in fp32.

Exits with code 1 if anything differs by more than it may, or was not run. Results are written as they come, and with
them the seconds of each run, and those until its first line of metrics: imports, the start of CUDA, and the compilation
of the kernels, which every process does for itself.

Needs `datasets`, which a machine without a network may lack. Bring the wheels of datasets, multiprocess and dill along:

    pip download --no-deps --dest wheels datasets multiprocess dill
    pip install --no-index --no-deps --find-links wheels --target /tmp/site-packages datasets multiprocess dill
    PYTHONPATH=/tmp/site-packages python benchmarks/gpu_run.py

The target's name must contain "site-packages": dill pickles functions by name only from such a folder.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

import gpu_report
from common import ROOT, markdown
from notus import demo
from notus.curation import synthetic

STEPS, SAVE_EVERY = 30, 5
ATTEMPTS = 3  # to kill a run before it ends by itself
# The largest difference of two losses at the same step, from the same weights and data. With seed 1 on a CPU, bf16 and
# fp32 were 4e-3 (SFT), 1.1e-2 (DPO) and 1.5e-3 (LoRA) apart: RMSprop's first updates are all of the same size, so that
# rounding decides the direction of some.
TOLERANCES = {"sft": 0.02, "dpo": 0.03, "dpo-lora": 0.01}
DPO = {"optimizer": "rmsprop", "learning_rate": 2.5e-5, "lr_schedule": "linear"}
# In this order: what matters most comes first, as time may run out. DPO starts from the base model, which is random.
CASES: dict[str, dict[str, Any]] = {
    # With evaluations and samples on the way: what stands between two steps must leave no trace.
    "dpo": {
        "data": {"eval_size": 32},
        "training": {**DPO, "eval_every": 10, "activation_checkpointing": "products"},
        "tracking": {"samples": 2, "sample_tokens": 8},
    },
    "dpo-lora": {
        "training": {**DPO, "learning_rate": 3e-4},
        "lora": {"rank": 8, "alpha": 16.0, "target_modules": "all-linear"},
    },
    "sft": {"training": {"optimizer": "adamw", "learning_rate": 1e-3, "lr_schedule": "cosine"}},
}


@dataclasses.dataclass
class Bench:
    """Everything that the steps share.

    Attributes:
        scratch: where models, data and runs are.
        output: the report's file.
        end: seconds since the epoch at which nothing may run any more.
        cpu: the runs in question are on the CPU as well.
        report: what was found so far.
    """

    scratch: Path
    output: Path
    end: float
    cpu: bool
    seed: int
    report: dict[str, Any] = dataclasses.field(default_factory=lambda: {"checks": [], "losses": {}})
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def note(self, section: str, name: str, value: float) -> None:
        """Keep a figure. Threads do so beside the main one, which may be writing the report: in a new dictionary."""
        with self._lock:
            self.report = {**self.report, section: {**self.report.get(section, {}), name: value}}

    def check(self, name: str, find: Callable[[], str | None]) -> bool:
        """Record and return whether a comparison passes: `find` returns what is wrong. An error in it is a failure."""
        try:
            wrong = find()
        except Exception as error:
            wrong = gpu_report.in_words(error)
        self.report["checks"].append({"name": name, "passed": wrong is None, "message": wrong})
        print(f"{'ok' if wrong is None else 'FAILED'}: {name}{'' if wrong is None else f': {wrong}'}", flush=True)
        gpu_report.write(self.report, self.output)
        return wrong is None


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    options = _parse(arguments)
    if importlib.util.find_spec("datasets") is None:
        print("error: `datasets` is not installed; the head of benchmarks/gpu_run.py says how", file=sys.stderr)
        return 1
    scratch = Path(tempfile.mkdtemp(prefix="notus-gpu-run-"))
    seed = random.randrange(2**31) if options.seed is None else options.seed
    bench = Bench(
        scratch, options.output or scratch / "report.json", time.time() + 60 * options.minutes, options.cpu, seed
    )
    bench.report["seed"] = seed
    print(f"seed {seed}, files in {scratch}", flush=True)
    bench.check("the model and the data are made", lambda: make_inputs(scratch, seed))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for case in options.cases:
            check_case(bench, case, pool)
    failed = [check["name"] for check in bench.report["checks"] if not check["passed"]]
    print(f"{len(bench.report['checks']) - len(failed)} of {len(bench.report['checks'])} checks passed; {bench.output}")
    return int(bool(failed))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing runs any more")
    parser.add_argument("--output", type=Path, help="JSON file, written again after each result")
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--seed", type=int, help="of data, model, training and of the moment of the kill (default: random)"
    )
    return parser.parse_args(arguments)


# ---- what the runs start from ----


def make_inputs(scratch: Path, seed: int) -> None:
    """Make the base model, the demonstrations and the preference pairs."""
    demo.make_base(scratch / "base", seed)
    for_sft, for_preferences = synthetic.make_prompts([1200, 1200], seed=seed)
    rows = {"sft": synthetic.demonstrations(for_sft, seed=seed)}
    rows["records"] = synthetic.ultrafeedback_records(for_preferences, seed=seed)
    for name, made in rows.items():
        (scratch / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    curate = [sys.executable, "-m", "notus", "curate", str(scratch / "records.jsonl"), str(scratch / "dpo.jsonl")]
    subprocess.run([*curate, "--seed", str(seed)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def write_config(bench: Bench, case: str) -> Path:
    """Write the YAML of a case."""
    task = "sft" if case == "sft" else "dpo"
    tree: dict[str, Any] = {
        "model": {"name_or_path": str(bench.scratch / "base")},
        "data": {"train": str(bench.scratch / f"{task}.jsonl"), "max_length": 64},
        "training": {
            "output_dir": str(bench.scratch / f"{case}-undisturbed"), "batch_size": 32, "tokens_per_row": 1024,
            "max_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1, "warmup_ratio": 0.1, "precision": "bf16",
            "activation_checkpointing": "selective", "deterministic": True, "seed": bench.seed,
        },
        "tracking": {"samples": 0},
    }  # fmt: skip
    for section, keys in CASES[case].items():
        tree[section] = {**tree.get(section, {}), **keys}
    path = bench.scratch / f"{case}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


# ---- running ----


class OutOfTime(Exception):
    """Nothing may run any more."""


def start(bench: Bench, case: str, name: str, *words: str, cpu: bool = False) -> "subprocess.Popen[bytes]":
    """Start the entry of a case; its output goes to NAME.log and the run to the folder NAME."""
    entry = ROOT / f"train_{'sft' if case == 'sft' else 'dpo'}.py"
    places = (f"--training.output_dir={bench.scratch / name}", f"--data.cache_dir={bench.scratch / name}-cache")
    command = [sys.executable, str(entry), str(bench.scratch / f"{case}.yaml"), *places, *words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if cpu:  # two threads: the model is small, and runs go on beside each other
        environment = {"OMP_NUM_THREADS": "2", **environment, "CUDA_VISIBLE_DEVICES": ""}
    if time.time() > bench.end:
        raise OutOfTime("not run: out of time")
    with (bench.scratch / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(bench: Bench, name: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait for a run's end, and note the seconds until its first line of metrics and until its end.

    Raises:
        OutOfTime: it takes too long; it is killed.
        RuntimeError: it failed.
    """
    began, first, lines_before = time.time(), None, len(metrics(bench.scratch / name))
    try:
        while process.poll() is None:
            if time.time() > bench.end:
                raise OutOfTime(f"{name} was stopped: out of time")
            if first is None and len(metrics(bench.scratch / name)) > lines_before:
                first = time.time() - began
                bench.note("seconds_to_first_line", name, first)
            time.sleep(0.05)
        code = process.returncode
        bench.note("seconds", name, time.time() - began)
    finally:
        process.kill()
        process.wait()
    if code:
        lines = (bench.scratch / f"{name}.log").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{name} ended with exit code {code}: {lines[-1] if lines else ''}")


def run(bench: Bench, case: str, name: str, *words: str, cpu: bool = False) -> list[float]:
    """Run a case to its end and return its losses."""
    finish(bench, name, start(bench, case, name, *words, cpu=cpu))
    return losses(bench.scratch / name)


def kill_after_a_checkpoint(bench: Bench, case: str) -> str:
    """Start the run anew until one could be killed at a random step after its first checkpoint; its name.

    Raises:
        OutOfTime: none could be in time.
        RuntimeError: it was over each time, or failed.
    """
    chance = random.Random(f"{bench.seed} {case}")
    for attempt in range(ATTEMPTS):
        name, step = f"{case}-killed-{attempt}", chance.randint(SAVE_EVERY + 1, STEPS - 2)
        process = start(bench, case, name, cpu=bench.cpu)
        while process.poll() is None and time.time() < bench.end:
            if len(metrics(bench.scratch / name)) >= step and checkpoints(bench.scratch / name):
                break
            time.sleep(0.002)
        process.kill()
        code = process.wait()
        if time.time() > bench.end:
            raise OutOfTime(f"{name} was stopped: out of time")
        if code == -9:
            bench.note("killed_at_step", name, len(metrics(bench.scratch / name)))
            return name
        if code:
            finish(bench, name, process)
    raise RuntimeError(f"the run was over before it could be killed, {ATTEMPTS} times")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of `metrics.jsonl` without the timings, which differ between equal runs."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {key: value for key, value in record.items() if not key.endswith("per_second") and "system/" not in key}
        for record in records
    ]


def checkpoints(folder: Path) -> list[str]:
    """Return the names of the run's checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def losses(folder: Path) -> list[float]:
    """Return the loss of each step."""
    return [record["loss"] for record in metrics(folder) if "loss" in record]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the final model."""
    files = sorted(path for path in (folder / "model").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- comparing ----


def check_case(bench: Bench, case: str, pool: concurrent.futures.ThreadPoolExecutor) -> None:
    """Do everything for a case, all runs beside each other: the model is small, and they start slowly."""
    write_config(bench, case)
    undisturbed = f"{case}-undisturbed"
    others = {"fp32": f"{case}-cpu-fp32"} if bench.cpu else {p: f"{case}-cpu-{p}" for p in ("bf16", "fp32")}
    beside = {
        precision: pool.submit(run, bench, case, name, f"--training.precision={precision}", cpu=True)
        for precision, name in others.items()
    }
    again = pool.submit(kill_and_resume, bench, case)

    def ends() -> str | None:
        steps = len(run(bench, case, undisturbed, cpu=bench.cpu))
        return None if steps == STEPS else f"{steps} steps in place of {STEPS}"

    if bench.check(f"{case}: runs to its end", ends):
        bench.check(f"{case}: killed and resumed, equal bit for bit", lambda: unlike(bench, case, again.result()))
    for precision, future in beside.items():
        name = f"{case}: losses as on the CPU in {precision}"
        bench.check(name, lambda p=precision, f=future: compare(bench, case, p, f.result()))
    if found := bench.report["losses"].get(case):
        print(table(found), flush=True)


def kill_and_resume(bench: Bench, case: str) -> str:
    """Kill a run and start it again with the same command; its name.

    Raises:
        RuntimeError: it began anew, or failed.
    """
    name = kill_after_a_checkpoint(bench, case)
    log = bench.scratch / name / "metrics.jsonl"
    first_line = log.read_text().splitlines()[0]
    finish(bench, name, start(bench, case, name, cpu=bench.cpu))
    if log.read_text().splitlines()[0] != first_line:  # it says how fast the step was, which no second run repeats
        raise RuntimeError("the run began anew in place of resuming from its checkpoint")
    return name


def unlike(bench: Bench, case: str, name: str) -> str | None:
    """Say what differs between the undisturbed run of a case and another."""
    return difference(bench.scratch / f"{case}-undisturbed", bench.scratch / name)


def difference(expected: Path, found: Path) -> str | None:
    """Say in what two runs differ; None: in nothing but their timings."""
    wanted_lines, got_lines = metrics(expected), metrics(found)
    if len(wanted_lines) != len(got_lines):
        return f"{len(got_lines)} lines of metrics in place of {len(wanted_lines)}"
    for wanted, got in zip(wanted_lines, got_lines, strict=True):
        if wanted != got:
            key = min(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))
            return f"step {wanted.get('step')}: {key} is {got.get(key)!r} in place of {wanted.get(key)!r}"
    wanted_files, got_files = digests(expected), digests(found)
    if not wanted_files:
        return f"{expected}/model holds no file"
    unlike = sorted(name for name, _ in wanted_files.items() ^ got_files.items())
    return f"{unlike[0]} differs" if unlike else None


def compare(bench: Bench, case: str, precision: str, expected: list[float]) -> str | None:
    """Record both runs' losses, and say whether they are too far apart at some step."""
    found = losses(bench.scratch / f"{case}-undisturbed")
    kept = bench.report["losses"].setdefault(case, {"bf16 here": found})
    kept[f"{precision} on the CPU"] = expected
    return too_far(found, expected, TOLERANCES[case])


def too_far(found: list[float], expected: list[float], tolerance: float) -> str | None:
    """Say at which step losses differ the most, if by more than `tolerance`, or are not those of the same steps."""
    if len(found) != len(expected) or not found:
        return f"{len(found)} losses beside {len(expected)}"
    errors = [abs(one - other) for one, other in zip(found, expected, strict=True)]
    worst = max(range(len(errors)), key=lambda step: errors[step] if errors[step] == errors[step] else float("inf"))
    message = f"step {worst + 1}: {found[worst]:.6f} and {expected[worst]:.6f}, {errors[worst]:.2e} apart"
    return None if errors[worst] <= tolerance else f"{message}, at most {tolerance:.0e}"


def table(columns: dict[str, list[float]]) -> str:
    """Return a markdown table: every fifth step, and the largest differences from the first column."""
    first, *others = columns.values()
    steps = range(0, min(map(len, columns.values())), SAVE_EVERY)
    rows = [[step + 1, *(f"{values[step]:.6f}" for values in columns.values())] for step in steps]
    apart = [max(abs(a - b) for a, b in zip(first, other, strict=False)) for other in others]
    rows.append(["largest difference", "", *(f"{value:.2e}" for value in apart)])
    return f"\n{markdown(['step', *columns], rows)}\n"


if __name__ == "__main__":
    raise SystemExit(main())
