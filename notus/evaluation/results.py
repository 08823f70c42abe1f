"""What every suite leaves behind in one form, for report and model card: `RUN/evaluations/SUITE/result.json`."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.evaluation.files import replacing

EVALUATIONS = "evaluations"
RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of an evaluation, with what a model card's metadata needs to say of it.

    Attributes:
        name: what people call the benchmark, as "AI2 Reasoning Challenge" or "reward accuracy".
        metric: the measure's name, as "acc_norm".
        value: the figure, in `unit`.
        unit: "%" (0 to 100), or "" for a plain number.
        stderr: its standard error, in `unit`; None: not known.
        count: how many examples it stands on; None: not known.
        setup: how it was measured, in a few words, as "25-shot".
        dataset: a hub id or a file's name; None: as `name`.
        reference: the figures of published models by their name, in `unit`.
    """

    name: str
    metric: str
    value: float
    unit: str = ""
    stderr: float | None = None
    count: int | None = None
    setup: str = ""
    dataset: str | None = None
    reference: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """An evaluation of one model by one suite.

    Attributes:
        suite: its name on the command line.
        model: the model as the user named it; of an unfinished run with the step, as "runs/dpo (step 100)".
        date: ISO date of the evaluation.
        figures: the headline figures, the most telling first.
        settings: how it was computed: flat, JSON values.
        details: whatever else the suite has to tell; JSON.
    """

    suite: str
    model: str
    figures: Sequence[Figure]
    settings: Mapping[str, Any]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())


def model_name(model: str) -> str:
    """What others call a model: of a folder its last part, or the hub id."""
    return Path(model).resolve().name if Path(model).exists() else model


def write_result(folder: Path, result: Result) -> Path:
    """Write `folder/result.json`, whole or not at all; returns its path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RESULT) as file:
        file.write(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return folder / RESULT


def read_result(path: Path) -> Result:
    """Read what `write_result` wrote. Raises ValueError, naming the file, for anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{**tree, "figures": [Figure(**figure) for figure in tree["figures"]]})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: not the result of an evaluation ({error}); evaluate again, or remove it") from error


def read_results(run: Path) -> list[Result]:
    """The results in a run's folder, by suite. Raises ValueError as `read_result`."""
    return [read_result(path) for path in sorted((run / EVALUATIONS).glob(f"*/{RESULT}"))]


def result_folder(given: str | None, run: Path | None, model: str, suite: str) -> Path:
    """Where a suite's results go: the folder that the user gave, else the run's own, else one named for the model."""
    if given is not None:
        return Path(given)
    if run is not None:
        return run / EVALUATIONS / suite
    name = model.strip("/").replace("/", "__")
    if not name.strip("."):  # "." or "..", which a file of annotations may call its model, are no folder's name
        name = Path(model).resolve().name or "unnamed"
    return Path(EVALUATIONS) / name / suite
