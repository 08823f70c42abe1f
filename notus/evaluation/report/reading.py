"""The runs that a report shows: what their folders hold, as curves and samples, with a short name for each."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notus.evaluation.files import told
from notus.evaluation.read_run import CONFIG_FILE, Run, read_lines, read_run
from notus.runtime.files import is_locked
from notus.training.run_folder import LOCK, MODEL
from notus.training.tracking import SAMPLES_FILE


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric over the run: steps int64 [n] and values fp64 [n]; a value that is not finite is NaN."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def known(self) -> "Curve":
        """The curve without the values that are not finite."""
        finite = np.isfinite(self.values)
        return Curve(self.steps[finite], self.values[finite])


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the model wrote at a step."""

    step: int
    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord(Run):
    """A run of the report.

    Attributes:
        label: a short name that no other run of the report has.
        state: "finished", "running", or "unfinished" (no launch holds the folder).
        config_text: the config file.
        curves: by the metric's name, each with at least one finite value.
        samples: by the prompt's index, each in the order of steps.
    """

    label: str
    state: str
    config_text: str
    curves: Mapping[str, Curve]
    samples: Sequence[Sequence[Sample]]

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run; None before a logged line says how many steps an epoch has."""
        epoch = self.curves["epoch"].known if "epoch" in self.curves else None
        if epoch is None or epoch.values[-1] <= 0:
            return None
        training = self.settings["training"]
        steps = training["epochs"] * round(float(epoch.steps[-1] / epoch.values[-1]))
        return int(steps if training["max_steps"] is None else min(steps, training["max_steps"]))

    def preference_details(self, name: str) -> Any:
        """A part of the preferences suite's details; None if there is no such result, or it lacks this part."""
        return next((result.details.get(name) for result in self.results if result.suite == "preferences"), None)


def read_runs(names: Sequence[str]) -> list[RunRecord]:
    """Read runs by their folders. Raises ValueError for what is no run, and for damaged files."""
    folders = [Path(name).expanduser() for name in names]
    labels = _labels([folder.resolve() for folder in folders])
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read(folder: Path, label: str) -> RunRecord:
    run = read_run(folder)
    return RunRecord(
        folder=folder,
        settings=run.settings,
        metrics=run.metrics,
        data=run.data,
        environment=run.environment,
        results=run.results,
        label=label,
        state=_state(folder),
        config_text=(folder / CONFIG_FILE).read_text(encoding="utf-8"),
        curves=_curves(run.metrics),
        samples=told(SAMPLES_FILE, [folder], lambda: _samples(read_lines(folder / SAMPLES_FILE))),
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that all differ. Raises ValueError if a folder is given twice."""
    if len(set(folders)) < len(folders):
        raise ValueError("report: a run is given twice; name each once")
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


def _state(folder: Path) -> str:
    if any((folder / MODEL / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "finished"
    return "running" if is_locked(folder / LOCK) else "unfinished"


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    columns: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                # An integer beyond all floats is not finite, too.
                finite = abs(value) <= sys.float_info.max
                columns.setdefault(name, []).append((record["step"], float(value) if finite else math.nan))
    curves = {name: Curve(*map(np.array, zip(*points, strict=True))) for name, points in columns.items()}
    return {name: curve for name, curve in curves.items() if np.isfinite(curve.values).any()}


def _samples(records: Sequence[Mapping[str, Any]]) -> list[list[Sample]]:
    by_index: dict[int, dict[int, Sample]] = {}  # a step repeated after a crash may be there twice
    for record in records:
        sample = Sample(record["step"], str(record["prompt"]), str(record["completion"]))
        by_index.setdefault(record["index"], {})[sample.step] = sample
    return [[steps[step] for step in sorted(steps)] for _, steps in sorted(by_index.items())]
