"""Runs side by side in the terminal: the settings that differ, and the last and best values of their metrics."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notus.evaluation.formatting import setting
from notus.evaluation.read_run import Curve, read_run
from notus.evaluation.report.tables import differing_settings
from notus.training.best_model import HIGHER_IS_BETTER, deciding_metrics
from notus.training.run_folder import CONFIG_FILE

# What the table shows, if a run has it: the first of them that any run has is what it is sorted by.
METRICS = (
    "eval_rewards/kendall_tau",
    "eval_rewards/accuracies",
    "eval_loss",
    "eval_rewards/margins",
    "rewards/kendall_tau",
    "rewards/accuracies",
    "loss",
    "rewards/margins",
)


@dataclasses.dataclass(frozen=True)
class Measure:
    """The last value of a metric in a run, and the best one with its step; None if no value is better than another."""

    final: float
    best: float | None
    best_step: int | None

    @classmethod
    def of(cls, metric: str, steps: np.ndarray, values: np.ndarray) -> "Measure":
        """Return those of values fp64 [n] at steps int64 [n]; the earliest of equal ones is the best."""
        higher = higher_is_better(metric)
        if higher is None:
            return cls(float(values[-1]), None, None)
        place = int(values.argmax() if higher else values.argmin())
        return cls(float(values[-1]), float(values[place]), int(steps[place]))


@dataclasses.dataclass(frozen=True)
class Row:
    """A run in the table.

    Attributes:
        name: its folder's name.
        state: finished, running, unfinished, failed or not begun.
        settings: its config, `{section: {key: value}}`.
        metrics: its evaluations, and the last step's loss and rewards, by name.
        seconds: how long it trained, over all launches; None if that is not known.
    """

    name: str
    state: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Measure]
    seconds: float | None = None


def higher_is_better(metric: str) -> bool | None:
    """Whether a larger value of a metric is the better one; None if neither can be said, as of `kl`."""
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    return HIGHER_IS_BETTER.get(name, False) if deciding_metrics([name]) else None


def read_rows(folder: Path, planned: Mapping[str, Mapping[str, Any]], failed: Collection[str]) -> list[Row]:
    """Return a row for each planned run, and for each other run in the folder.

    Args:
        folder: holds the runs' folders.
        planned: the planned runs' configs by name.
        failed: names of runs that failed.

    Raises:
        ValueError: a run's files are damaged; the message names the file.
    """
    rows = []
    earlier = {path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}")} - set(planned)
    for name in [*planned, *sorted(earlier)]:
        if (folder / name / CONFIG_FILE).is_file():
            found = read_run(folder / name)
            state = "failed" if name in failed else found.state
            curves = {metric: _trained(curve) for metric, curve in found.curves.items() if _is_shown(metric)}
            metrics = {
                metric: Measure.of(metric, curve.steps, curve.values)
                for metric, curve in curves.items()
                if len(curve.steps)
            }
            rows.append(Row(name, state, found.settings, metrics, found.environment.get("seconds")))
        else:
            rows.append(Row(name, "failed" if name in failed else "not begun", planned[name], {}))
    return rows


def _trained(curve: Curve) -> Curve:
    """Return the known values after training began: the model that a run starts from is none of its results."""
    known = curve.known
    return Curve(known.steps[known.steps > 0], known.values[known.steps > 0])


def _is_shown(metric: str) -> bool:
    return metric.startswith("eval_") or metric in METRICS


def sorted_rows(rows: Sequence[Row], metric: str | None) -> list[Row]:
    """Return the rows with the best model by `metric` first; those without it keep their order at the end.

    The model of a run is that of its last step, or of its best evaluation by `training.best_metric`. If no value of the
    metric is better than another, the smallest is first.
    """
    if metric is None:
        return list(rows)
    sign = -1 if higher_is_better(metric) else 1

    def place(row: Row) -> float:
        found = row.metrics[metric]
        by_best = row.settings["training"].get("best_metric") == metric
        return sign * (found.best if by_best and found.best is not None else found.final)

    with_metric = [row for row in rows if metric in row.metrics]
    return sorted(with_metric, key=place) + [row for row in rows if metric not in row.metrics]


def compared_settings(rows: Sequence[Row], keys: Iterable[str]) -> dict[str, list[Any]]:
    """Return the settings to show, one value per row: `keys`, and those that differ and influence the result."""
    asked_for = {key: [_setting(row, key) for row in rows] for key in keys}
    return asked_for | differing_settings([row.settings for row in rows])


def _setting(row: Row, key: str) -> Any:
    section, name = key.split(".")
    return row.settings.get(section, {}).get(name)


def table(rows: Sequence[Row], settings: Mapping[str, Sequence[Any]], metric: str | None) -> str:
    """Return the comparison as lines: settings by key, metrics, seconds, state and folder of each run."""
    known = {name for row in rows for name in row.metrics}
    evaluated = [name for name in METRICS if name.startswith("eval_") and name in known]
    shown = evaluated or [name for name in METRICS if name in known]
    if metric is not None and metric not in shown:
        shown = [metric, *shown]
    lines = [[*_short_names(settings), *_heads(shown), "seconds", "state", "run"]]
    for place, row in enumerate(rows):
        values = [setting(column[place]) for column in settings.values()]
        values += [cell for name in shown for cell in _cells(name, row.metrics.get(name))]
        lines.append([*values, "" if row.seconds is None else f"{row.seconds:.0f}", row.state, row.name])
    return "\n".join(_aligned(lines, left=2))


def _short_names(keys: Collection[str]) -> list[str]:
    """Return the last part of each key, or all of it where two keys would look alike."""
    shorts = [key.rsplit(".", 1)[-1] for key in keys]
    return [short if shorts.count(short) == 1 else key for short, key in zip(shorts, keys, strict=True)]


def _aligned(lines: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return lines of cells with their columns aligned: the last `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    signs = [">"] * (len(widths) - left) + ["<"] * left
    forms = [f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True)]
    return ["  ".join(form.format(cell) for form, cell in zip(forms, line, strict=True)).rstrip() for line in lines]


def _has_best(metric: str) -> bool:
    """Whether the best value is shown: that of a training step is noise, and a larger margin is not a better run."""
    return metric.startswith("eval_") and not metric.endswith("margins") and higher_is_better(metric) is not None


def _heads(metrics: Sequence[str]) -> list[str]:
    return [head for metric in metrics for head in [metric, *(["best"] if _has_best(metric) else [])]]


def _cells(metric: str, found: Measure | None) -> list[str]:
    values = [None, None] if found is None else [found.final, found.best]
    return ["" if value is None else f"{value:.4g}" for value in values[: 1 + _has_best(metric)]]
