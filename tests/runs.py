"""Small runs on toy models and toy pairs, for the tests of training and of what comes after it."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from notus.config import Config, config_from_dict

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "sea",
    "poem",
    "answer",
    "question",
    "hello",
    "world",
]


def words(generator: random.Random, low: int, high: int) -> str:
    """A few words, low to high of them."""
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


def write_pairs(path: Path, count: int, *, seed: int = 0, swap: bool = False) -> Path:
    """JSONL preference pairs of plain strings; `swap` exchanges chosen and rejected."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        prompt, first, second = (words(generator, 1, 9) for _ in range(3))
        chosen, rejected = (f" {second}b", f" {first}a") if swap else (f" {first}a", f" {second}b")
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(folder: Path, model: Path, pairs: Path, **overrides: Any) -> dict[str, dict[str, Any]]:
    """A nested config for a run in `folder`; overrides are written section__key=value."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(model)},
        "data": {"train": str(pairs), "max_length": 120, "cache_dir": str(pairs.parent / "cache")},
        "training": {
            "output_dir": str(folder), "batch_size": 4, "epochs": 1, "tokens_per_row": 400, "precision": "fp32",
            "learning_rate": 1e-3, "activation_checkpointing": "none", "warmup_ratio": 0.0,
        },
        "tracking": {"samples": 0},
    }  # fmt: skip
    for name, value in overrides.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return tree


def config(task: str, folder: Path, model: Path, pairs: Path, **overrides: Any) -> Config:
    """The same as a Config."""
    return config_from_dict(settings(folder, model, pairs, **overrides), task)  # type: ignore[arg-type]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's samples.jsonl."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def without_timings(folder: Path) -> list[dict[str, float]]:
    """The same lines without what differs between equal runs: speed and memory."""
    return [
        {key: value for key, value in line.items() if not key.endswith("per_second") and not key.startswith("system/")}
        for line in read_metrics(folder)
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights bit for bit, and the same metrics, timings aside."""
    files = sorted(path.name for path in (one / "model").glob("*.safetensors"))
    assert files
    for name in files:
        first, second = (load_file(run / "model" / name) for run in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert without_timings(one) == without_timings(other)


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait, but not for ever."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def write_messages(path: Path, count: int, *, seed: int = 0) -> Path:
    """JSONL demonstrations of plain strings."""
    generator = random.Random(seed)
    lines = [
        json.dumps({"prompt": words(generator, 1, 9), "completion": " " + words(generator, 1, 9)}) for _ in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, action: Callable[[], None]) -> None:
    """Do something just before the method `name` is called for the `number`th time."""
    inner, calls = getattr(owner, name), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            action()
        return inner(*arguments, **named)

    patch.setattr(owner, name, counted)


def terminate() -> None:
    """Let this process be preempted, and give its watching thread the time to see it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
