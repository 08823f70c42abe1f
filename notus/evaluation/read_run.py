"""A training run's folder as the report and the model card read it: finished or not, with the files that are there."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from notus.evaluation.resolve_model import read_run_settings
from notus.evaluation.results import EVALUATIONS, RESULT, Result, is_run, read_records, read_results
from notus.evaluation.run_loss import RunLoss, read_loss
from notus.runtime.files import is_locked
from notus.training.best_model import HIGHER_IS_BETTER
from notus.training.run_data import DATA_FILE
from notus.training.run_folder import CONFIG_FILE, LOCK, is_finished
from notus.training.tracking import ENVIRONMENT_FILE, INITIAL_FILE, METRICS_FILE, SAMPLES_FILE

RESULT_FILES = f"{EVALUATIONS}/*/{RESULT}"


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


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's files."""

    folder: Path  # the run's folder
    settings: dict[str, dict[str, Any]]  # the resolved config by section
    # the lines of `metrics.jsonl`, each with an integer `step`; before them the evaluation at step 0, if there is one.
    metrics: Sequence[Mapping[str, Any]]
    # data, environment: `data.json` and `environment.json`; empty if they do not exist.
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: Sequence[Result]  # the evaluations, by suite
    label: str = ""  # a short name; see `read_runs`

    @property
    def task(self) -> Literal["dpo", "sft"]:
        """What was trained; only DPO's config has a section of that name."""
        return "dpo" if "dpo" in self.settings else "sft"

    @functools.cached_property
    def loss(self) -> RunLoss | None:
        """What a run of preferences minimised; None: SFT. Raises ValueError for a loss that this version lacks."""
        return read_loss(self.settings, str(self.folder / CONFIG_FILE))

    @property
    def rows(self) -> Literal["sft", "pairs", "lists", "labels"]:
        """Which rows of data it learned from. Raises ValueError as `loss`."""
        return "sft" if self.loss is None else self.loss.rows

    @property
    def unit(self) -> str:
        """What these rows are called, in the plural. Raises ValueError as `loss`."""
        return "examples" if self.loss is None else self.loss.unit

    @property
    def base(self) -> str:
        """The model that the run started from, as its config names it."""
        return str(self.settings["model"]["name_or_path"])

    @property
    def reference(self) -> str:
        """The model that rewards are relative to, as the config names it: by default the one that the run started from.

        A run of an earlier version has no key for another one.
        """
        return str(self.settings.get("reference", {}).get("model") or self.base)

    @functools.cached_property
    def state(self) -> Literal["finished", "running", "unfinished"]:
        """Whether the run has its final model; if not, whether a process holds its folder.

        A run that is being extended is not finished: its model is that of the run before.
        """
        if is_finished(self.folder):
            return "finished"
        return "running" if is_locked(self.folder / LOCK) else "unfinished"

    @property
    def config_text(self) -> str:
        """The config file."""
        return (self.folder / CONFIG_FILE).read_text(encoding="utf-8")

    @functools.cached_property
    def curves(self) -> dict[str, Curve]:
        """The metrics by name, each with at least one finite value."""
        columns: dict[str, list[tuple[int, float]]] = {}
        for line in self.metrics:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    finite = abs(value) <= sys.float_info.max  # an integer can be beyond all floats
                    columns.setdefault(name, []).append((line["step"], float(value) if finite else math.nan))
        curves = {name: Curve(*map(np.array, zip(*points, strict=True))) for name, points in columns.items()}
        return {name: curve for name, curve in curves.items() if np.isfinite(curve.values).any()}

    @functools.cached_property
    def samples(self) -> list[list[Sample]]:
        """The samples by the prompt's index, each in the order of steps."""
        by_index: dict[int, dict[int, Sample]] = {}  # a step repeated after a crash may be there twice
        for line in read_lines(self.folder / SAMPLES_FILE):
            sample = Sample(line["step"], str(line["prompt"]), str(line["completion"]))
            by_index.setdefault(line["index"], {})[sample.step] = sample
        return [[steps[step] for step in sorted(steps)] for _, steps in sorted(by_index.items())]

    def start(self, name: str) -> float | None:
        """A held-out metric before training, by its name with `eval_`; None if it was not measured."""
        curve = self.curves[name].known if name in self.curves else None
        return float(curve.values[0]) if curve is not None and curve.steps[0] == 0 else None

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)

    @property
    def exported_step(self) -> int:
        """The step whose model is the final one: that of the best evaluation by `training.best_metric`, else the last.

        The evaluation before training is none of them, and the earliest of equal ones is the best, as in `best_model`.
        """
        name = self.settings["training"].get("best_metric")
        if self.state != "finished" or name not in self.curves:
            return self.step
        curve = self.curves[name].known
        trained = curve.steps > 0
        if not trained.any():
            return self.step
        ranked = curve.values[trained] if HIGHER_IS_BETTER.get(name, False) else -curve.values[trained]
        return int(curve.steps[trained][ranked.argmax()])

    def of_model(self, name: str) -> tuple[int, float] | None:
        """The step and the value of the last line up to `exported_step` that has a metric; None if there is none.

        The evaluation before training is none of a run that has begun to train.
        """
        if name not in self.curves:
            return None
        curve = self.curves[name].known
        of_model = (curve.steps <= self.exported_step) & ((curve.steps > 0) | (self.step == 0))
        places = np.flatnonzero(of_model)
        return (int(curve.steps[places[-1]]), float(curve.values[places[-1]])) if len(places) else None

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


def read_runs(names: Sequence[str]) -> list[Run]:
    """Read several runs; the label of each is the shortest end of its path that no other has. Raises as `read_run`."""
    folders = [Path(name).expanduser() for name in names]
    ends = [folder.resolve().parts for folder in folders]
    if len(set(ends)) < len(ends):
        raise ValueError("report: a run is given twice; name each once")
    for length in range(1, max(map(len, ends)) + 1):
        labels = ["/".join(parts[-length:]) for parts in ends]
        if len(set(labels)) == len(labels):
            break
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def read_run(folder: Path, label: str = "") -> Run:
    """Read a run's folder. Raises ValueError, naming the file, for what is no run or is damaged."""
    if not is_run(folder):
        raise ValueError(f"{folder}: not a run (it has no {CONFIG_FILE}); name the folder in training.output_dir")
    return Run(
        folder=folder,
        settings=read_run_settings(folder),
        metrics=[*initial_evaluation(folder), *read_lines(folder / METRICS_FILE)],
        data=_read_object(folder / DATA_FILE),
        environment=_read_object(folder / ENVIRONMENT_FILE),
        results=read_results(folder),
        label=label,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log, but for one that the run is still writing; see `read_records`."""
    wrong = "not an object with a step; restore the file, or move it away"
    return read_records(path, wrong, lambda record: isinstance(record.get("step"), int))


def initial_evaluation(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluation before training as a line of metrics; none if a run has not made one.

    Raises ValueError, naming the file, if it is damaged.
    """
    found = _read_object(folder / INITIAL_FILE)
    return [{"step": 0, **{name: value for name, value in found.items() if name.startswith("eval_")}}] if found else []


def _read_object(path: Path) -> dict[str, Any]:
    """Read a file's JSON object; empty if there is no file. Raises ValueError, naming the file."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); restore the file, or remove it") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a JSON object; restore the file, or remove it")
    return tree
