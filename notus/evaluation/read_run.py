"""A training run's folder as the report and the model card read it: finished or not, with the files that are there."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from notus.evaluation.models import is_run, read_run_settings
from notus.evaluation.results import EVALUATIONS, RESULT, Result, read_results
from notus.training.describe import DATA_FILE, ENVIRONMENT_FILE
from notus.training.run_folder import CONFIG_FILE
from notus.training.tracking import METRICS_FILE

RESULT_FILES = f"{EVALUATIONS}/*/{RESULT}"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's files.

    Attributes:
        folder: the run's folder.
        settings: the resolved config by section.
        metrics: the lines of `metrics.jsonl`, each with an integer `step`.
        data, environment: `data.json` and `environment.json`; empty if they do not exist.
        results: the evaluations, by suite.
    """

    folder: Path
    settings: dict[str, dict[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: Sequence[Result]

    @property
    def task(self) -> Literal["dpo", "sft"]:
        """What was trained; only DPO's config has a section of that name."""
        return "dpo" if "dpo" in self.settings else "sft"

    @property
    def base(self) -> str:
        """The model that the run started from, as its config names it."""
        return str(self.settings["model"]["name_or_path"])


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises ValueError, naming the file, for what is no run or is damaged."""
    if not is_run(folder):
        raise ValueError(f"{folder}: not a run (it has no {CONFIG_FILE}); name the folder in training.output_dir")
    return Run(
        folder=folder,
        settings=read_run_settings(folder),
        metrics=read_lines(folder / METRICS_FILE),
        data=_read_object(folder / DATA_FILE),
        environment=_read_object(folder / ENVIRONMENT_FILE),
        results=read_results(folder),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file's complete lines; none if there is no file.

    A last line that the run is still writing is left out. Raises ValueError, naming file and line.
    """
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
