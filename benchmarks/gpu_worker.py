"""The worker of `gpu.py`: does tasks one after the other, and writes what each finds before the next begins."""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

import gpu_report
from common import GIB, fastest, matmul_rate
from gpu_parity import comparisons
from gpu_peers import measure_peer, peers
from gpu_rows import CPU, GPU, Row, Scale, fitting, measure, plan, recompiles, release
from notus.model.flops import gpu_of_driver
from notus.runtime.distributed import process_group
from notus.runtime.switches import disabled, disabled_names

# Exit code: a new process must go on. This one's CUDA context is broken, or it cannot free what a row allocated.
START_ANEW = 77
MOST_LEFT = 2 * GIB
# The timed steps of a row may take this share of the time that there is for everything.
SHARE_PER_ROW = 1 / 60
SECONDS_PER_PRODUCT = 0.1
PACKAGES = ("torch", "transformers", "numpy", "safetensors", "trl", "liger-kernel")

Found = Iterable[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is done as a whole: if it fails, the others still run.

    Attributes:
        section: of the report, "parity", "rates" or "rows".
        name: unique.
        find: yields one result or more.
    """

    section: str
    name: str
    find: Callable[[], Found]


def work(options: argparse.Namespace) -> int:
    """Do every task of the stage `options.only` that no worker before this one began. Returns the exit code."""
    _end_with_the_supervisor()
    with process_group() as device:
        rows = row_tasks(device, 60 * options.minutes)
        try:
            rows = selected(rows, options.rows)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return gpu_report.USAGE
        tasks = parity_tasks(device) if options.only == "parity" else [*rate_tasks(device), *rows]
        report = gpu_report.read(options.output)
        report["hardware"] = report["hardware"] or describe(device)
        report["planned"][options.only] = [task.name for task in tasks]
        with disabled(*disabled_names(), *options.without):
            healthy = Worker(report, options, device).run(tasks)
        _leave(0 if healthy else START_ANEW)
    return 0


def _leave(code: int) -> None:
    """End the process at once: an orderly end may wait for a device that is stuck, or abort in a broken context."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_the_supervisor() -> None:
    """End this process when the supervisor is gone: its end of the pipe closes then."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # `sys.stdin.read` would hold a lock that the interpreter wants at its end
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Worker:
    """Runs tasks and keeps the report on disk up to date."""

    def __init__(self, report: dict[str, Any], options: argparse.Namespace, device: torch.device) -> None:
        """Begin with what earlier workers found; `options`: see `gpu.py`."""
        self.report, self._output, self._until, self._began = report, options.output, options.worker, options.began
        self._device = device

    def run(self, tasks: Iterable[Task]) -> bool:
        """Whether this process can go on; False: a new one must do the tasks that are left."""
        gpu_report.write(self.report, self._output)
        for task in tasks:
            if task.name in self.report["begun"] or not self._time_for(task):
                continue
            self.report["begun"].append(task.name)
            self.report["running"] = {"section": task.section, "name": task.name}
            gpu_report.write(self.report, self._output)
            began = time.time()
            failed = self._attempt(task)
            healthy = self._clean_up(task, failed)
            if task.section == "rows":
                self.report["rows"][-1]["took"] = time.time() - began
            self.report["running"] = None
            gpu_report.write(self.report, self._output)
            self._print(task)
            if not healthy:
                return False
        return True

    def _time_for(self, task: Task) -> bool:
        """Whether a task that takes as long as the last of its kind would end in time."""
        compiled = "compiled" in task.name
        like = [row for row in self.report[task.section] if ("compiled" in row["name"]) == compiled]
        return time.time() + (like[-1].get("took", 0.0) if like else 0.0) < self._until

    def _attempt(self, task: Task) -> bool:
        """Add what the task finds to the report, one result at a time. Whether an error ended it early."""
        try:
            for found in task.find():
                self._add(task, {"status": "measured", **found})
        except torch.OutOfMemoryError:
            self._add(task, {"status": gpu_report.OUT_OF_MEMORY})
        except Exception as error:
            trace = traceback.format_exc()[-4000:]
            self._add(task, {"status": f"failed: {gpu_report.in_words(error)}", "traceback": trace})
            return True
        return False

    def _add(self, task: Task, found: dict[str, Any]) -> None:
        for rate, share in (("necessary", "mfu"), ("done", "hardware_utilisation")):
            basis = gpu_report.basis(self.report)
            if basis and f"{rate}_flops_per_second" in found:
                found[share] = found[f"{rate}_flops_per_second"] / basis
        self.report[task.section].append({"name": task.name, **found})
        gpu_report.write(self.report, self._output)

    def _clean_up(self, task: Task, failed: bool) -> bool:
        """Free what the task left. Whether the device still works, and has its memory back."""
        try:
            release(self._device)
            if self._device.type != "cuda":
                return not failed or usable(self._device)
            left = torch.cuda.memory_allocated()
            if left > MOST_LEFT:
                self.report["problems"].append(f"{task.name}: {left / GIB:.1f} GiB are still allocated after it")
            return left <= MOST_LEFT and usable(self._device)
        except Exception as broken:  # a CUDA error that the task caused may be reported only now
            self.report["problems"].append(f"{task.name}: memory was not released: {gpu_report.in_words(broken)}")
            return usable(self._device)

    def _print(self, task: Task) -> None:
        elapsed = f"[{time.time() - self._began:4.0f} s]"
        count = len(self.report["parity"])
        if task.section == "parity" and count % 25 == 0:
            print(f"{elapsed} {count} comparisons done", file=sys.stderr, flush=True)
        if task.section != "parity":
            print(f"{elapsed} {gpu_report.line(self.report[task.section][-1])}", file=sys.stderr, flush=True)
        for failure in gpu_report.failed_checks(self.report):
            if task.section == "parity" and failure.startswith(task.name):
                print(f"{elapsed} FAILED: {failure}", file=sys.stderr, flush=True)


def usable(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access or a failed assertion nothing in the process does."""
    try:
        return torch.zeros(1, device=device).add_(1).item() == 1.0
    except Exception:
        return False


# ---- the device ----


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date and commit."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    if device.type == "cpu":
        return {"device": f"CPU, {torch.get_num_threads()} threads", **found}
    properties = torch.cuda.get_device_properties(device)
    gpu = gpu_of_driver(properties.name)
    return {
        "device": properties.name,
        "memory_gib": properties.total_memory / GIB,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "power_limit": _output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "peak_bf16_flops_per_second": gpu.teraflops * 1e12 if gpu else None,
        **found,
    }


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where there is no such command, or it fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- what the device does when it does nothing else ----


def block_rate(config: MistralConfig, tokens: int, device: torch.device) -> float:
    """FLOP/s of the products of each linear layer of a block, in bf16."""
    hidden, mlp, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = {(queries, hidden): 1, (keys, hidden): 2, (hidden, queries): 1, (mlp, hidden): 2, (hidden, mlp): 1}
    layers = [(shape, tokens, count) for shape, count in shapes.items()]
    return matmul_rate(layers, device, torch.bfloat16, SECONDS_PER_PRODUCT)


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / fastest(lambda: target.copy_(source), device, SECONDS_PER_PRODUCT)


# ---- the tasks, the most important first ----


def parity_tasks(device: torch.device) -> list[Task]:
    """Every comparison."""

    def results(find: Callable[[], Iterable[Any]]) -> Found:
        return ({**dataclasses.asdict(check), "passed": check.passed} for check in find())

    return [Task("parity", name, functools.partial(results, find)) for name, find in comparisons(device)]


def rate_tasks(device: torch.device) -> list[Task]:
    """What the device does when it does nothing else."""
    scale, memory = _scale(device), _memory(device)

    def products() -> Found:
        config = fitting(scale, memory, lora=False)[1]
        yield {"flops_per_second": block_rate(config, scale.tokens_per_row["full"], device)}

    def copy() -> Found:
        yield {"bytes_per_second": bandwidth(device)}

    return [Task("rates", "matrix products", products), Task("rates", "copy", copy)]


def row_tasks(device: torch.device, seconds: float) -> list[Task]:
    """Every row of the table; compiling a toy on a CPU would take a minute each."""
    cuda, scale, memory = device.type == "cuda", _scale(device), _memory(device)
    per_row = seconds * SHARE_PER_ROW if cuda else 0.0
    found: list[Task] = []

    def add(name: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        found.append(Task("rows", name, lambda: iter([function(*arguments)])))

    for item in plan(rank=64 if cuda else 8):
        if isinstance(item, Row):
            if (cuda or not item.compile) and (item.optimizer[1] != "int8" or _version("torchao")):
                add(item.name, measure, item, scale, device, per_row, memory)
        elif item == "recompiles":
            if cuda:
                add("recompiles", recompiles, scale, device)
        else:
            for peer in peers(item):
                add(peer.name, measure_peer, peer, scale, device, per_row, memory)
    return found


def selected(tasks: list[Task], patterns: Iterable[str]) -> list[Task]:
    """Those of which a pattern is the name, or a part of it, or a glob for it; all if there are no patterns.

    Raises:
        ValueError: a pattern selects none.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        names = [task.name for task in tasks]
        hits = [name for name in names if name == pattern] or [name for name in names if _matches(name, pattern)]
        if not hits:
            raise ValueError(f"--rows {pattern!r} selects no row; there are:\n  " + "\n  ".join(names))
        chosen.update(hits)
    return [task for task in tasks if task.name in chosen or not chosen]


def _matches(name: str, pattern: str) -> bool:
    name, pattern = name.lower(), pattern.lower()
    return pattern in name or fnmatchcase(name, pattern)


def _scale(device: torch.device) -> Scale:
    return GPU if device.type == "cuda" else CPU


def _memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
