"""Folders of runs as training leaves them, without the training, for the tests of the report."""

import json
import math
from pathlib import Path
from typing import Any

from runs import config

from notus.config import save_config


def dpo_metrics(steps: int, *, eval_every: int = 0) -> list[dict[str, Any]]:
    """A line of metrics for each of `steps` steps: the loss falls from ln 2, ten steps are an epoch."""
    lines = []
    for step in range(1, steps + 1):
        line = {
            "step": step, "loss": math.log(2) - 0.01 * (step - 1), "rewards/chosen": 0.02 * (step - 1),
            "rewards/rejected": -0.03 * (step - 1), "rewards/accuracies": 0.5 + 0.25 * (step % 2),
            "rewards/margins": 0.05 * (step - 1), "logps/chosen": -10.0, "logps/rejected": -20.0 - step,
            "pairs_per_second": 40.0 + step, "learning_rate": 1e-5 * step, "grad_norm": 1.5, "epoch": step / 10,
            "num_tokens": 100 * step,
        }  # fmt: skip
        if eval_every and step % eval_every == 0:
            line |= {"eval_loss": 0.6 - 0.001 * step, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.25}
        lines.append(line)
    return lines


def list_metrics(steps: int) -> list[dict[str, Any]]:
    """The same of a loss of lists, a sum of two: Kendall's τ rises from 0."""
    return [
        {
            **line, "rewards/kendall_tau": 0.02 * (line["step"] - 1), "rewards/top_1": 0.25, "loss/plackett_luce": 3.0,
            "loss/all_pairs": 0.7, "eval_rewards/kendall_tau": 0.5,
        }
        for line in dpo_metrics(steps)
    ]  # fmt: skip


def label_metrics(steps: int) -> list[dict[str, Any]]:
    """The same of KTO."""
    return [{**line, "kl": 0.125 * line["step"]} for line in dpo_metrics(steps)]


def sft_metrics(steps: int) -> list[dict[str, Any]]:
    """The same of SFT."""
    return [
        {"step": step, "loss": 5.0 / step, "examples_per_second": 300.0, "learning_rate": 1e-3, "epoch": step / 10}
        for step in range(1, steps + 1)
    ]


def write_run(
    folder: Path, task: str = "dpo", *, metrics: list[dict[str, Any]] | None = None,
    samples: list[dict[str, Any]] | None = None, data: Any = None, environment: Any = None,
    finished: bool = True, **overrides: Any,
) -> Path:  # fmt: skip
    """Write a run's folder, of a config's overrides and what its files are to hold."""
    folder.mkdir(parents=True)
    save_config(config(task, folder, Path("base"), Path("pairs.jsonl"), **overrides), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text(_lines(dpo_metrics(10) if metrics is None else metrics))
    if samples is not None:
        (folder / "samples.jsonl").write_text(_lines(samples))
    for file, tree in (("data.json", data), ("environment.json", environment)):
        if tree is not None:
            (folder / file).write_text(json.dumps(tree))
    if finished:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    return folder


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
