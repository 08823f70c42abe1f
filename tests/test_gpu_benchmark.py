"""`benchmarks/gpu.py`: what it needs, what it counts, that it notices what is wrong, and that nothing ends it early."""

import argparse
import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from notus.model import attention
from notus.runtime import switches
from notus.runtime.distributed import process_group
from notus.training.activation_checkpointing import MODES

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# What the machine of a GPU check need not have.
ABSENT = ("datasets", "wandb", "trl", "pyarrow", "pandas", "peft", "accelerate", "tensorboard")
WITHOUT_THEM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu
gpu.WORKER = (sys.executable, __file__)
raise SystemExit(gpu.main())
"""
# A worker that needs no second to start: it begins the tasks of TASKS that are left, each as its kind says.
FAKE_WORKER = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_report
words = dict(zip(sys.argv[1:], sys.argv[2:]))
output, stage = Path(words["--output"]), words["--only"]
report = gpu_report.read(output)
report["planned"][stage] = list(TASKS[stage])
for name, kind in TASKS[stage].items():
    if name in report["begun"]:
        continue
    if kind == "cannot begin":
        raise SystemExit("no such device")
    report["begun"].append(name)
    report["running"] = {{"section": stage, "name": name}}
    gpu_report.write(report, output)
    if kind == "dies":
        os.kill(os.getpid(), 9)
    if kind == "hangs":
        time.sleep(60)
    found = {{"error": 0.0, "tolerance": 1e-5, "passed": True}} if stage == "parity" else {{"graphs": 1, "steps": 50}}
    found["graphs_after_two_steps"] = 1
    report[stage].append({{"name": name, "status": "measured", **found}})
    report["running"] = None
    gpu_report.write(report, output)
"""


@pytest.fixture
def module(benchmarks):
    """Imports a module of benchmarks/."""
    return importlib.import_module


# ---- the whole check ----

# A row of each kind. Others differ in settings that `test_the_operations_of_a_step_are_those_that_torch_counts` has.
KINDS = (
    "DPO full, shared, checkpointing products",
    "DPO full, shared, checkpointing none",
    "DPO full, transformers' own forward in a plain loop, padded, checkpointing full",
    "MoE DPO full, shared, checkpointing products",
    "DPO full, shared, checkpointing products, adamw int8",
    "DPO full, shared, checkpointing products, without fused_optimizer",
    "DPO full, shared, checkpointing products, all optimisations off",
    "DPO LoRA r=8, padded, checkpointing products",
    "SFT full, packed, checkpointing products",
    "DPO QLoRA r=8, shared, checkpointing products",
)


@pytest.mark.slow
def test_the_whole_check_on_a_toy_with_torch_and_transformers_alone(tmp_path):
    output, driver = tmp_path / "found.json", tmp_path / "driver.py"
    driver.write_text(WITHOUT_THEM)
    command = [sys.executable, driver, "--cpu", "--minutes", "4", "--output", output, "--rows", *KINDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert len(found["parity"]) > 130
    assert all(check["passed"] for check in found["parity"])
    assert {
        "attention repeats bit for bit when deterministic, bf16",
        "attention, a corner at column 15, multi-head, fp32",
    } <= {check["name"] for check in found["parity"]}
    assert found["planned"]["rows"] == [result["name"] for result in [*found["rates"], *found["rows"]]]
    assert set(KINDS) <= set(found["planned"]["rows"])
    assert {result["status"] for result in [*found["rates"], *found["rows"]]} == {"measured"}
    for row in found["rows"]:
        assert row["pairs_per_second"] > 0
        assert row.get("predicted_gib", 1.0) > 0
        assert 0 < row["mfu"] < 1
        assert row.get("hardware_utilisation", 1.0) > row["mfu"]
    assert sum(found["rows"][0]["shares"].values()) == pytest.approx(1)
    assert "| DPO full, shared, checkpointing none |" in done.stdout
    assert "| graph_attention | 2 to 4% | not run |" in done.stdout
    assert "| fused_optimizer | 2% | not run |" not in done.stdout
    assert found["hardware"]["versions"]["torch"] == torch.__version__
    assert found["problems"] == []
    assert found["running"] is None


# ---- the supervisor ----


@pytest.fixture
def supervised(module, monkeypatch, tmp_path, capsys):
    """Runs `gpu.main` over a fake worker with these tasks; gives exit code, report and what was printed."""

    def run(tasks, *words):
        worker, output = tmp_path / "worker.py", tmp_path / "found.json"
        worker.write_text(f"TASKS = {tasks!r}\n{FAKE_WORKER}")
        monkeypatch.setattr(module("gpu"), "WORKER", (sys.executable, str(worker)))
        code = module("gpu").main(["--cpu", "--output", str(output), *words])
        return code, json.loads(output.read_text()), capsys.readouterr().out

    return run


def test_a_worker_that_dies_costs_one_comparison_and_one_row(supervised):
    tasks = {"parity": {"a": "good", "b": "dies", "c": "good"}, "rows": {"d": "dies", "e": "good"}}
    code, found, printed = supervised(tasks)
    assert code == 1
    assert [check["status"][:6] for check in found["parity"]] == ["measur", "failed", "measur"]
    assert found["parity"][1] == {"name": "b", "status": "failed: parity: the process ended with exit code -9"}
    assert [(row["name"], row["status"][:6]) for row in found["rows"]] == [("d", "failed"), ("e", "measur")]
    assert "Parity: 2 of 3 comparisons within tolerance." in printed
    assert "- FAILED: b: failed: parity: the process ended with exit code -9" in printed
    assert "| d | failed: rows: the process ended with exit code -9 |" in printed


def test_a_worker_that_hangs_costs_one_row(supervised, module, monkeypatch):
    monkeypatch.setattr(module("gpu"), "SILENCE", {"parity": 30.0, "rows": 2.0})
    code, found, _ = supervised({"parity": {"a": "good"}, "rows": {"b": "hangs", "c": "good"}})
    assert code == 1
    assert found["rows"][0]["status"].startswith("failed: rows: the process was stopped: it did nothing for 2 s")
    assert found["rows"][1]["status"] == "measured"


def test_a_worker_that_cannot_begin_ends_its_stage_alone(supervised):
    code, found, printed = supervised({"parity": {"a": "cannot begin"}, "rows": {"b": "good"}})
    assert code == 1
    assert found["problems"] == ["parity: the process ended with exit code 1"]
    assert [row["status"] for row in found["rows"]] == ["measured"]
    assert "- PROBLEM: parity: the process ended with exit code 1" in printed


def test_what_the_time_did_not_suffice_for_is_said_and_is_no_failure_of_a_row(supervised, module, monkeypatch):
    monkeypatch.setattr(module("gpu"), "GRACE", 1.0)
    code, found, printed = supervised({"parity": {}, "rows": {"b": "hangs", "c": "good"}}, "--minutes", "0")
    assert code == 0
    assert found["rows"] == [{"name": "b", "status": "not run: out of time"}]
    assert "| b | not run: out of time |" in printed
    code, found, printed = supervised({"parity": {"a": "hangs", "b": "good"}, "rows": {}}, "--minutes", "0")
    assert code == 1
    assert "NOT RUN" in printed


def test_an_earlier_output_is_kept(supervised, tmp_path):
    (tmp_path / "found.json").write_text("earlier")
    assert supervised({"parity": {}, "rows": {}})[0] == 0
    assert (tmp_path / "found.previous.json").read_text() == "earlier"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_ended_leaves_what_it_measured_and_no_worker(tmp_path, number):
    worker, output, driver = tmp_path / "worker.py", tmp_path / "found.json", tmp_path / "driver.py"
    own_end = (
        "import os, threading\nthreading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()\n"
    )
    worker.write_text(f"TASKS = {{'parity': {{'a': 'good'}}, 'rows': {{'b': 'hangs'}}}}\n{own_end}{FAKE_WORKER}")
    driver.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu\n"
                      f"gpu.WORKER = (sys.executable, {str(worker)!r}); raise SystemExit(gpu.main())")  # fmt: skip
    check = subprocess.Popen([sys.executable, driver, "--cpu", "--output", output], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (output.exists() and (json.loads(output.read_text())["running"] or {}).get("name") == "b"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    check.send_signal(number)
    printed, _ = check.communicate(timeout=30)  # the worker holds the pipe, too: it ends here only if that has ended
    assert json.loads(output.read_text())["parity"][0]["passed"]
    assert check.returncode == (0 if number == signal.SIGTERM else -number)
    assert ("Parity: 1 of 1" in printed) == (number == signal.SIGTERM)


# ---- the worker ----


def _options(output, **others):
    return argparse.Namespace(
        **{"output": output, "worker": time.time() + 600, "began": time.time(), "minutes": 8.0, "rows": [], **others}
    )


def _run(module, tmp_path, tasks, **options):
    """Run these tasks, (section, name, find) each, in this process; whether it can go on, and the report."""
    gpu_report, gpu_worker = module("gpu_report"), module("gpu_worker")
    output = tmp_path / "found.json"
    report = gpu_report.read(output) if output.exists() else json.loads(json.dumps(gpu_report.EMPTY))
    worker = gpu_worker.Worker(report, _options(output, **options), CPU)
    healthy = worker.run([gpu_worker.Task(*task) for task in tasks])
    return healthy, json.loads(output.read_text())


def _raises(error):
    def find():
        yield {"pairs_per_second": 1.0}
        raise error

    return find


def test_a_task_that_raises_costs_that_task_and_keeps_what_it_had_found(module, tmp_path):
    tasks = [
        ("rates", "copy", _raises(ValueError("no such copy"))),
        ("rows", "a", lambda: iter([{"pairs_per_second": 2.0}])),
        ("rows", "b", _raises(RuntimeError("boom\nmore"))),
        ("rows", "c", _raises(torch.OutOfMemoryError())),
        ("rows", "d", lambda: iter([{"pairs_per_second": float("nan")}])),
    ]
    healthy, found = _run(module, tmp_path, tasks)
    assert healthy
    assert [rate["status"] for rate in found["rates"]] == ["measured", "failed: ValueError: no such copy"]
    statuses = ["measured", "measured", "failed: RuntimeError: boom", "measured", "out of memory", "measured"]
    assert [row["status"] for row in found["rows"]] == statuses
    assert found["rows"][-1]["pairs_per_second"] is None  # JSON knows no NaN


def test_an_error_in_the_release_of_memory_is_survived_and_told(module, tmp_path, monkeypatch):
    def release(_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(module("gpu_worker"), "release", release)
    tasks = [("rows", name, lambda: iter([{"graphs": 1}])) for name in "ab"]
    healthy, found = _run(module, tmp_path, tasks)
    assert healthy
    assert [row["name"] for row in found["rows"]] == ["a", "b"]
    assert found["problems"][0] == "a: memory was not released: RuntimeError: CUDA error: unspecified launch failure"


def test_when_nothing_computes_any_more_a_new_worker_does_the_rest(module, tmp_path, monkeypatch):
    tasks = [("rows", "a", _raises(RuntimeError("illegal access"))), ("rows", "b", lambda: iter([{"graphs": 1}]))]
    with monkeypatch.context() as patch:
        patch.setattr(module("gpu_worker"), "usable", lambda _: False)
        healthy, found = _run(module, tmp_path, tasks)
        assert not healthy
        assert [row["name"] for row in found["rows"]] == ["a", "a"]
    healthy, found = _run(module, tmp_path, tasks)
    assert healthy
    assert [row["name"] for row in found["rows"]] == ["a", "a", "b"]


def test_a_worker_leaves_with_a_code_of_its_own_when_nothing_computes_any_more(module, tmp_path, monkeypatch):
    gpu_worker, gpu_report = module("gpu_worker"), module("gpu_report")
    gpu_report.write(gpu_report.EMPTY, tmp_path / "found.json")
    codes = []
    monkeypatch.setattr(gpu_worker, "_end_with_the_supervisor", lambda: None)
    monkeypatch.setattr(gpu_worker, "_leave", codes.append)
    monkeypatch.setattr(gpu_worker, "usable", lambda _: False)
    monkeypatch.setattr(gpu_worker, "comparisons", lambda _: [("a", _raises(RuntimeError("x")))])
    gpu_worker.work(_options(tmp_path / "found.json", only="parity", without=()))
    assert codes == [gpu_worker.START_ANEW]


def test_a_kernel_that_raises_costs_its_own_comparisons(module, tmp_path, monkeypatch):
    gpu_worker, _ = _small_parity(module, monkeypatch)

    def wrong(query, key, value, layout, scale, window):
        if window is not None:
            raise RuntimeError("no kernel for a window")
        return attention.sdpa_kernel(query, key, value, layout, scale, None)

    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype: ("wrong", wrong))
    tasks = [(task.section, task.name, task.find) for task in gpu_worker.parity_tasks(CPU)]
    healthy, found = _run(module, tmp_path, tasks)
    assert healthy
    raised = [check["name"] for check in found["parity"] if check["status"] != "measured"]
    window = [f"attention, pairs, grouped-query, window 16, {precision}" for precision in ("bf16", "fp32")]
    assert raised == [*window, "policy, window", "policy, all cases"]
    assert all(check["passed"] for check in found["parity"] if check["name"] not in raised)
    assert "- FAILED: policy, window: failed: RuntimeError: no kernel for a window" in module("gpu_report").markdown(
        found
    )


def _small_parity(module, monkeypatch):
    gpu_parity = module("gpu_parity")
    monkeypatch.setattr(gpu_parity, "ROWS", {"pairs": gpu_parity.ROWS["pairs"]})
    monkeypatch.setattr(gpu_parity, "HEADS", {"grouped-query": (8, 2)})
    monkeypatch.setattr(gpu_parity, "POLICIES", {"window": {"sliding_window": 9}})
    return module("gpu_worker"), gpu_parity


def test_a_wrong_kernel_fails_its_comparisons(module, tmp_path, monkeypatch):
    gpu_worker, _ = _small_parity(module, monkeypatch)

    def wrong(query, key, value, layout, scale, window):
        """Right but for the sliding window, which it does not know."""
        return attention.sdpa_kernel(query, key, value, layout, scale, None)

    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype: ("wrong", wrong))
    tasks = [(task.section, task.name, task.find) for task in gpu_worker.parity_tasks(CPU)]
    _, found = _run(module, tmp_path, tasks)
    failed = "\n".join(module("gpu_report").failures(found))
    assert "attention, pairs, grouped-query, window 16, fp32: " in failed
    assert "policy, window, K=2, log-probs, fp32: " in failed
    assert "attention, pairs, grouped-query, fp32" not in failed


def test_attention_that_does_not_repeat_fails_the_check(module, monkeypatch):
    _, gpu_parity = _small_parity(module, monkeypatch)
    calls = iter(range(10))

    def random(query, key, value, layout, scale, window):
        return attention.sdpa_kernel(query, key, value, layout, scale, window) * (1 + 1e-6 * next(calls))

    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype: ("random", random))
    (check,) = gpu_parity._repeats(CPU, "fp32")
    assert check.error > 0
    assert not check.passed


def test_the_fused_functions_are_compared_where_there_is_a_generator_of_comparisons(module, tmp_path, monkeypatch):
    gpu_worker, gpu_parity = _small_parity(module, monkeypatch)

    def fused_checks(device, dtype):
        yield "norm", 1e-7, 1e-6
        yield "swiglu", 1e-3, 1e-6
        raise RuntimeError("triton")

    monkeypatch.setattr(gpu_parity.fused, "fused_checks", fused_checks)
    tasks = [
        (task.section, task.name, task.find) for task in gpu_worker.parity_tasks(CPU) if "fused, fp32" in task.name
    ]
    _, found = _run(module, tmp_path, tasks)
    assert [(check["name"], check.get("passed", False)) for check in found["parity"]] == [
        ("fused, norm, fp32", True), ("fused, swiglu, fp32", False), ("fused, fp32", False)]  # fmt: skip


def test_a_task_is_not_begun_without_the_time_for_it(module, tmp_path):
    tasks = [("rows", name, lambda: iter([{"graphs": 1}])) for name in ("a", "b, compiled")]
    output = tmp_path / "found.json"
    report = json.loads(json.dumps(module("gpu_report").EMPTY))
    report["rows"] = [{"name": "before, compiled", "status": "measured", "took": 1000.0}]
    module("gpu_report").write(report, output)
    _, found = _run(module, tmp_path, tasks)
    assert [row["name"] for row in found["rows"]] == ["before, compiled", "a"]


# ---- rows ----


def test_rows_are_picked_by_name_part_or_pattern(module):
    gpu_worker = module("gpu_worker")
    tasks = [gpu_worker.Task("rows", name, lambda: iter([])) for name in ("DPO, full", "DPO, full, compiled", "SFT")]

    def picked(*patterns):
        return [task.name for task in gpu_worker.selected(tasks, patterns)]

    assert picked() == ["DPO, full", "DPO, full, compiled", "SFT"]
    assert picked("DPO, full") == ["DPO, full"]  # the whole name, so not what begins with it
    assert picked("dpo") == ["DPO, full", "DPO, full, compiled"]
    assert picked("sft", "*compiled") == ["DPO, full, compiled", "SFT"]
    with pytest.raises(ValueError, match=r"'orpo' selects no row; there are:\n  DPO, full\n  DPO"):
        picked("sft", "orpo")


def test_an_unknown_row_ends_the_check_with_the_names_and_costs_no_earlier_output(tmp_path):
    (tmp_path / "found.json").write_text("earlier")
    command = [sys.executable, "benchmarks/gpu.py", "--cpu", "--output", tmp_path / "found.json", "--rows", "orpo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--rows 'orpo' selects no row" in done.stderr
    assert "  DPO full, shared, checkpointing full\n" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    assert (tmp_path / "found.json").read_text() == "earlier"


def test_options_without_effect_and_mistyped_optimisations_are_errors(tmp_path, module, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        module("gpu").main(["--only", "parity", "--rows", "SFT"])
    assert "--rows has no effect with --only parity" in capsys.readouterr().err
    monkeypatch.setenv("NOTUS_DISABLE", "fused")
    assert module("gpu").main(["--output", str(tmp_path / "found.json")]) == 2
    assert "NOTUS_DISABLE: there is no optimisation 'fused'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_decisive_rows_come_first_and_names_are_unique(module):
    gpu_rows = module("gpu_rows")
    planned = gpu_rows.plan(rank=64)
    rows = [row for row in planned if isinstance(row, gpu_rows.Row)]
    first = planned[: len(MODES)]
    assert sorted(row.checkpointing for row in first) == sorted(MODES)
    assert {(row.task, row.rank, row.variant, row.compile, row.without) for row in first} == {
        ("dpo", 0, "shared", False, ())
    }
    assert [row.profile for row in first] == [True, *[False] * (len(MODES) - 1)]
    assert planned[len(MODES)].compile
    assert len({row.name for row in rows}) == len(rows)
    compared = {row.without[0] for row in rows if len(row.without) == 1}
    elsewhere = {"attention_variants"}  # of other models than the benchmark's, see benchmarks/attention_variants.py
    assert compared | elsewhere == switches.OPTIMISATIONS.keys()
    assert planned.index("transformers") < planned.index("trl")


def test_a_row_is_measured_without_its_optimisations_and_those_of_the_call(module, monkeypatch, tmp_path):
    rows = shapes = module("gpu_rows")
    seen = []
    monkeypatch.setattr(rows, "_measured", lambda *_: {"off": seen.append(sorted(switches.disabled_names()))})
    row = rows.Row("dpo", 0, "shared", without=("fp32_addmm",))
    with switches.disabled("fused_optimizer"):
        rows.measure(row, shapes.CPU, CPU, 0.0, None)
    assert seen == [["fp32_addmm", "fused_optimizer"]]
    assert switches.disabled_names() == frozenset()
    gpu = module("gpu")
    assert gpu._parse(["--without", "fp32_addmm,fused_optimizer"]).without == ("fp32_addmm", "fused_optimizer")
    with pytest.raises(SystemExit):
        gpu._parse(["--without", "fp32_adm"])


def test_the_worker_switches_off_what_the_call_says(module, monkeypatch, tmp_path):
    gpu_worker, gpu_report = module("gpu_worker"), module("gpu_report")
    gpu_report.write(gpu_report.EMPTY, tmp_path / "found.json")
    seen = []
    find = lambda: iter([{"graphs": len(seen), "off": seen.append(sorted(switches.disabled_names()))}])  # noqa: E731
    monkeypatch.setattr(gpu_worker, "_end_with_the_supervisor", lambda: None)
    monkeypatch.setattr(gpu_worker, "_leave", lambda code: seen.append(code))
    monkeypatch.setattr(gpu_worker, "rate_tasks", lambda _: [])
    monkeypatch.setattr(gpu_worker, "row_tasks", lambda *_: [gpu_worker.Task("rows", "a", find)])
    gpu_worker.work(_options(tmp_path / "found.json", only="rows", without=("fused_optimizer",)))
    assert seen == [["fused_optimizer"], 0]


def test_what_a_change_saves_by_hand(module):
    gpu_report = module("gpu_report")

    def row(times, mode="products", without=(), tokens=8):
        return {
            "name": "x", "task": "dpo", "rank": 0, "variant": "shared", "checkpointing": mode, "compile": False,
            "without": list(without), "times": times, "tokens_per_row": tokens,
        }  # fmt: skip

    best, again = row([[1, 9.0], [2, 6.0], [1, 8.0]]), row([[1, 9.0], [2, 7.0]])
    off = row([[1, 10.0], [2, 10.0], [3, 1.0]], without=("fused_optimizer",))
    everything = row([[2, 12.0]], without=tuple(switches.OPTIMISATIONS), tokens=4)
    selective = row([[1, 10.0], [3, 5.0]], mode="selective")
    report = {"rows": [best, again, off, everything, selective]}

    def saving(change):
        return gpu_report._saving(report, change)

    assert saving("fused_optimizer") == "30.0%; 20.0%"  # 1 - 14/20 and 1 - 16/20
    assert saving("checkpointing products, against selective") == "20.0%; 10.0%"
    assert saving("all of these optimisations").startswith("50.0% (rows of 8 against 4 tokens); ")
    assert saving("graph_attention") == "not run"


def test_a_row_keeps_what_it_measured_when_the_profiler_or_the_prediction_fails(module, monkeypatch):
    rows = shapes = module("gpu_rows")

    def broken(*_, **__):
        raise RuntimeError("CUPTI")

    monkeypatch.setattr(rows, "record", broken)
    monkeypatch.setattr(rows, "predicted_bytes", broken)
    with process_group() as device:
        found = rows.measure(rows.Row("dpo", 0, "shared", profile=True), shapes.CPU, device, 0.0, None)
    assert found["pairs_per_second"] > 0
    assert found["notes"] == ["no predicted_gib: RuntimeError: CUPTI", "no shares: RuntimeError: CUPTI"]


def test_wrong_logprobs_fail_the_check(module, monkeypatch):
    gpu_parity = module("gpu_parity")
    monkeypatch.setattr(gpu_parity, "linear_logprobs", lambda *args, **_: gpu_parity.full_logprobs(*args) * 1.00001)
    assert not any(check.passed for check in gpu_parity._logprob_checks(CPU) if "fp32" in check.name)
    assert not gpu_parity.Check("an error that is no number", float("nan"), 1.0).passed


@pytest.mark.parametrize("variant", ["shared", "packed", "padded"])
@pytest.mark.parametrize(("rank", "checkpointing"), [*((0, mode) for mode in MODES), (4, "full")])
def test_the_operations_of_a_step_are_those_that_torch_counts(module, rank, checkpointing, variant):
    shapes = rows = module("gpu_rows")
    step = module("step")
    examples = shapes.pairs(4, shapes.CPU, 400)
    batches = module("step").rows(variant, examples, 256, 64)
    with process_group() as device:
        policy, work = step.build(shapes.TOY, device, rank=rank, checkpointing=checkpointing, compile=False)
        take = step.Step(policy, "dpo", 400)
        with FlopCounterMode(display=False) as counter:
            take(batches)
        rows.release(device)
    products = ("mm", "addmm", "bmm")
    counts = {op.__name__.split(".")[0]: flops for op, flops in counter.get_flop_counts()["Global"].items()}
    found = sum(flops for name, flops in counts.items() if name in products)
    no_attention = dataclasses.replace(work, dimensions=dataclasses.replace(work.dimensions, layers=0))
    # the head's last chunk is not computed again; the embedding of a LoRA policy needs no gradient below its adapters
    expected = no_attention.done(batches)
    last_chunks = (
        2 * work.dimensions.head_weights * sum(mask.sum() for row in batches for i in row for mask in i.loss_masks)
    )
    assert found == pytest.approx(expected - last_chunks, rel=0.06 if rank else 1e-6)
    assert work.necessary(examples) <= work.done(batches)


def test_rows_are_halved_until_they_fit_or_else_memory_is_out(module, monkeypatch):
    rows = shapes = module("gpu_rows")
    device, row = CPU, rows.Row("dpo", 0, "shared", "full")
    tried = []

    def fits(row, config, scale, device, seconds, tokens):
        tried.append(tokens)
        return {"tokens_per_row": tokens} if tokens <= limit else None

    monkeypatch.setattr(rows, "_try", fits)
    limit = 128
    assert rows.measure(row, shapes.CPU, device, 0.0, None)["tokens_per_row"] == 128
    assert tried == [512, 256, 128]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        rows.measure(row, shapes.CPU, device, 0.0, None)


def test_the_shape_follows_from_the_memory(module):
    shapes = module("gpu_rows")
    assert shapes.parameters(shapes.MISTRAL_7B) == 7_241_732_096
    assert shapes.fitting(shapes.GPU, 150_000_000_000, lora=False)[0] == "Mistral-7B"
    name, config = shapes.fitting(shapes.GPU, 85_000_000_000, lora=False)
    assert (name, config.num_hidden_layers) == ("Mistral-7B, 16 of 32 layers", 16)
    assert shapes.fitting(shapes.GPU, 42_000_000_000, lora=True)[0] == "Mistral-7B"
    assert shapes.fitting(shapes.GPU, 16_000_000_000, lora=False)[0] == "Mistral, width 2048, 12 of 24 layers"
    with pytest.raises(ValueError, match="run with --cpu"):
        shapes.fitting(shapes.GPU, 2_000_000_000, lora=False)


def test_lengths_are_ultrafeedbacks_and_variants_hold_the_same_scored_tokens(module):
    shapes = module("gpu_rows")
    examples = shapes.pairs(2000, shapes.GPU, 32000)
    means = [sum(len(part(item)) for item in examples) / 2000 for part in (
        lambda item: item.trunk, lambda item: item.branches[0], lambda item: item.branches[1])]  # fmt: skip
    assert means == pytest.approx([176, 300, 280], rel=0.1)
    assert max(len(item.trunk) + len(branch) for item in examples for branch in item.branches) == 1024
    few = examples[:8]
    scored = {
        variant: sorted(
            branch[mask].tolist()
            for row in module("step").rows(variant, few, 4096, 1024)
            for item in row
            for branch, mask in zip(item.branches, item.loss_masks, strict=True)
        )
        for variant in ("shared", "packed", "padded")
    }
    assert scored["shared"] == scored["packed"] == scored["padded"]
    padded = module("step").rows("padded", few, 4096, 1024)
    assert all(len({len(branch) for item in row for branch in item.branches}) == 1 for row in padded)
