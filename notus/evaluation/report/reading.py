"""A run's folder, read for the report: finished or not, with whatever of its files is there."""

import contextlib
import dataclasses
import fcntl
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notus.evaluation.files import told
from notus.evaluation.models import is_run, read_run_settings
from notus.evaluation.results import Result, read_results
from notus.training.inputs import DATA_FILE
from notus.training.loggers import ENVIRONMENT_FILE, METRICS_FILE, SAMPLES_FILE
from notus.training.run_folder import CONFIG_FILE, LOCK, MODEL


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric over the run: steps int64 [n] and values fp64 [n]; a value that is not finite is NaN."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def known(self) -> "Curve":
        """The curve without what is not finite."""
        finite = np.isfinite(self.values)
        return Curve(self.steps[finite], self.values[finite])


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the model wrote at a step."""

    step: int
    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        folder: the run's folder.
        label: a short name that no other run of the report has.
        task: "dpo" or "sft".
        state: "finished", "running", or "unfinished" (no launch holds the folder).
        settings: the resolved config by section; `config_text`: the same as it stands in the file.
        curves: by metric's name, each with a finite value at least.
        samples: by prompt's index, each in the order of steps.
        data, environment: what these files hold; empty if they are not there.
        results: of the evaluations.
    """

    folder: Path
    label: str
    task: str
    state: str
    settings: Mapping[str, Mapping[str, Any]]
    config_text: str
    curves: Mapping[str, Curve]
    samples: Sequence[Sequence[Sample]]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: Sequence[Result]

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run; None before the first line says how many an epoch has."""
        epoch = self.curves["epoch"].known if "epoch" in self.curves else None
        if epoch is None or epoch.values[-1] <= 0:
            return None
        training = self.settings["training"]
        steps = training["epochs"] * round(float(epoch.steps[-1] / epoch.values[-1]))
        return int(steps if training["max_steps"] is None else min(steps, training["max_steps"]))

    def preference_details(self, name: str) -> Any:
        """A part of the preferences suite's details; None if there is no such result, or not this part of it."""
        return next((result.details.get(name) for result in self.results if result.suite == "preferences"), None)


def read_runs(names: Sequence[str]) -> list[RunRecord]:
    """Read runs by their folders. Raises ValueError for what is none, and for files that are not what they should be.

    A last line that is being written while this reads is left out.
    """
    folders = [Path(name).expanduser() for name in names]
    labels = _labels([folder.resolve() for folder in folders])
    return [_read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read_run(folder: Path, label: str) -> RunRecord:
    if not is_run(folder):
        raise ValueError(f"{folder}: not a run (it has no {CONFIG_FILE}); give the folder training.output_dir named")
    settings = read_run_settings(folder)
    return RunRecord(
        folder=folder,
        label=label,
        task="dpo" if "dpo" in settings else "sft",  # SFT's has no such section
        state=_state(folder),
        settings=settings,
        config_text=(folder / CONFIG_FILE).read_text(encoding="utf-8"),
        curves=_curves(_read_lines(folder / METRICS_FILE)),
        samples=told(SAMPLES_FILE, [folder], lambda: _samples(_read_lines(folder / SAMPLES_FILE))),
        data=_read_object(folder / DATA_FILE),
        environment=_read_object(folder / ENVIRONMENT_FILE),
        results=read_results(folder),
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart. Raises ValueError where one is given twice."""
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
    with contextlib.suppress(FileNotFoundError), (folder / LOCK).open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return "running"
        except OSError:  # a file system without locks cannot tell
            pass
    return "unfinished"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's whole lines; none if there is no file. Raises ValueError, naming file and line."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number}: not an object with a step; restore the file, or move it away")
        records.append(record)
    return records


def _read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no file. Raises ValueError, naming the file."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); restore the file, or remove it") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a JSON object; restore the file, or remove it")
    return tree


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(_finite(value))
    curves = {name: Curve(np.array(steps), np.array(values, float)) for name, (steps, values) in columns.items()}
    return {name: curve for name, curve in curves.items() if np.isfinite(curve.values).any()}


def _finite(value: float) -> float:
    """NaN for what is not finite, a whole number beyond all floats among it."""
    return float(value) if abs(value) <= sys.float_info.max else math.nan


def _samples(records: Sequence[Mapping[str, Any]]) -> list[list[Sample]]:
    by_index: dict[int, dict[int, Sample]] = {}  # a step taken again after a crash may be there twice
    for record in records:
        sample = Sample(record["step"], str(record["prompt"]), str(record["completion"]))
        by_index.setdefault(record["index"], {})[sample.step] = sample
    return [[steps[step] for step in sorted(steps)] for _, steps in sorted(by_index.items())]
