"""The figures of a run that a reader wants first: how good the model is, how far it moved, and what that took."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from notus.evaluation.formatting import change as difference
from notus.evaluation.formatting import duration, number, short_path, with_error
from notus.evaluation.read_run import Run
from notus.evaluation.report.charts import smooth
from notus.evaluation.results import Result


@dataclasses.dataclass(frozen=True)
class Headline:
    """A figure that a reader wants first: its value, how far it is from the start, and what else to know of it."""

    value: str
    notes: Sequence[str] = ()
    interval: str = ""  # its 95% interval, as "85.7% to 94.0%"
    change: str = ""  # since the start of training, as "+40.6 points"
    start: str = ""  # the value there
    arrow: str = ""  # "▲" or "▼", the direction of the change; "" if there is none
    better: bool | None = None  # whether the change is for the better; None: there is none, or neither
    unit: str = ""  # written small behind the value


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure of quality: its name, and what the metrics and the preferences suite call it."""

    name: str
    curve: str  # in the metrics of training; with `eval_` in front on held-out rows
    figure: str  # in the preferences suite
    unit: str = ""  # as in `number`
    higher_is_better: bool | None = True  # None: neither end is the better one


MEASURES = (
    Measure("accuracy", "rewards/accuracies", "accuracy", "share"),
    Measure("Kendall's τ", "rewards/kendall_tau", "kendall_tau"),
    Measure("top-1 accuracy", "rewards/top_1", "top_1", "share"),
    Measure("AUC", "rewards/auc", "auc"),
    Measure("reward margin", "rewards/margins", "margin", higher_is_better=None),
    Measure("loss", "loss", "loss", higher_is_better=False),
)
CHANGED = {"pairs": "Chosen log-prob change", "lists": "Best rated log-prob change", "labels": "Good log-prob change"}
TITLES = (  # of all headline figures, in the order of the page
    *(f"{rows} {measure.name}" for measure in MEASURES for rows in ("Held-out", "Training")),
    *CHANGED.values(), "KL", "Training time", "Speed", "Peak memory", "MFU",
)  # fmt: skip


def headlines(run: Run) -> dict[str, Headline]:
    """Return a run's headline figures by title, the most important first: how good, how far, how fast."""
    found: dict[str, Headline | None] = {}
    for measure in MEASURES:
        found[f"Held-out {measure.name}"] = held_out = _held_out(run, measure)
        if measure.curve == "loss" or held_out is None:
            found[f"Training {measure.name}"] = _training(run, measure)
    if run.rows in CHANGED:
        found[CHANGED[run.rows]] = _chosen_change(run)
    found["KL"] = _kl(run)
    found["Training time"] = _time(run)
    found["Speed"] = _speed(run)
    found["Peak memory"] = _peak(run, "system/gpu_memory_gib", "of one GPU") or _peak(
        run, "system/host_memory_gib", "of host memory"
    )
    if "system/mfu" in run.curves:
        mfu = float(np.nanmedian(run.curves["system/mfu"].values))
        found["MFU"] = Headline(number(mfu, "share"), ["of the GPUs' peak, median"])
    return {title: headline for title, headline in found.items() if headline is not None}


def _held_out(run: Run, measure: Measure) -> Headline | None:
    """Return the final model's value on held-out rows, with its interval if it was evaluated; None: there is none."""
    name = f"eval_{measure.curve}"
    if (evaluated := _evaluated(run, measure)) is not None:
        return evaluated
    if (found := run.of_model(name)) is None:
        return None
    step, value = found
    note = f"at step {step:,}" + (", whose model is exported" if run.exported_step != run.step else "")
    return _compared(value, run.start(name), measure, [note])


def _evaluated(run: Run, measure: Measure) -> Headline | None:
    """Return the preferences suite's value, with its interval; None if it has none that belongs here."""
    if measure.figure == "accuracy" and run.rows == "labels":  # the suite's has another threshold
        return None
    result = _evaluation(run)
    figure = next((figure for figure in result.figures if figure.metric == measure.figure), None) if result else None
    if result is None or figure is None or not math.isfinite(figure.value):
        return None
    value = figure.value / 100 if figure.unit == "%" else figure.value
    notes = [f"{figure.count:,} {'prompts' if run.rows == 'lists' else run.unit}"] if figure.count else []
    found = [(result.details.get(part) or {}).get(f"{measure.figure}_interval") for part in ("ranking", "overall")]
    interval = " to ".join(number(end, measure.unit) for end in next(filter(None, found), ()))
    start = run.start(f"eval_{measure.curve}") if _is_of_held_out(run, result) else None
    return dataclasses.replace(_compared(value, start, measure, notes), interval=interval)


def _evaluation(run: Run) -> Result | None:
    """Return the preferences suite's result, if it is of the final model, by rewards, and not of other rows."""
    for result in run.results:
        if result.suite == "preferences" and result.settings.get("ranked_by", "rewards") == "rewards":
            _, of_step, step = result.model.rpartition(" (step ")
            is_final = not of_step or step.rstrip(")") == str(run.exported_step)
            measured = any(name.startswith("eval_") for name in run.curves)
            if is_final and (not measured or _is_of_held_out(run, result)):
                return result
    return None


def _is_of_held_out(run: Run, result: Result) -> bool:
    """Whether a result is of the rows that the run itself held out, against its reference."""
    rows = str(result.settings.get("pairs"))
    paths = ", ".join(str(source["path"]) for source in run.settings["data"].get("eval") or ())
    return rows in (paths, f"{run.settings['data'].get('eval_size')} rows held out of data.train") and (
        str(result.settings.get("base")) == run.reference
    )


def _compared(value: float, start: float | None, measure: Measure, notes: Sequence[str]) -> Headline:
    """Return a figure beside what it was at the start of training, if that is known."""
    written = number(value, measure.unit)
    if start is None:
        return Headline(written, notes)
    words, before = difference(value, start, measure.unit), number(start, measure.unit)
    if value == start:
        return Headline(written, notes, change=words, start=before)
    rises = value > start
    better = None if measure.higher_is_better is None else rises == measure.higher_is_better
    return Headline(written, notes, change=words, start=before, arrow="▲" if rises else "▼", better=better)


def _training(run: Run, measure: Measure) -> Headline | None:
    """Return the value on training rows where its moving mean ends, beside that of the first step."""
    if measure.curve not in run.curves:
        return None
    known = run.curves[measure.curve].known
    calm = smooth(run.curves[measure.curve])
    note = f"at step {known.steps[-1]:,}" + ("" if calm is None else ", moving mean")
    last = known if calm is None else calm.known
    start = float(known.values[0]) if known.steps[0] <= 1 < len(known.steps) else None
    return _compared(float(last.values[-1]), start, measure, [note])


def _chosen_change(run: Run) -> Headline | None:
    """Return how far the log-prob of the better answers is from the reference's: held-out, else in training."""
    for prefix, where in (("eval_", "held-out"), ("", "training")):
        if (found := run.of_model(f"{prefix}logps/chosen_change")) is not None:
            value, unit = found[1], "nats per token"
        elif (
            run.loss is not None
            and run.loss.reference
            and (found := run.of_model(f"{prefix}rewards/chosen")) is not None
        ):
            value, unit = found[1] / run.loss.beta, "nats per answer"
        else:
            continue
        notes = [f"{unit}, {where}"]
        if value < 0:
            notes.append("these answers became less likely")
        return Headline(("+" if value > 0 else "") + number(value), notes)
    return None


def _kl(run: Run) -> Headline | None:
    found = run.preference_details("kl")
    if not found:
        return None
    # The base of the evaluation need not be the model that the run started from.
    settings = next(result.settings for result in run.results if result.suite == "preferences")
    base = short_path(str(settings.get("base") or "its base"))
    notes = [f"nats per answer, from {base}"]
    if found.get("samples"):
        notes.append(f"{found['samples']:,} samples")
    return Headline(with_error(found["per_sequence"], found.get("per_sequence_stderr")), notes)


def _time(run: Run) -> Headline | None:
    seconds, hardware = run.environment.get("seconds", 0), run.environment.get("hardware")
    notes = [str(hardware)] if hardware else []
    return Headline(duration(seconds), notes) if seconds >= 1 else None


def _speed(run: Run) -> Headline | None:
    """Return the median rows per second, and tokens."""
    rows = {"pairs_per_second": run.unit.split()[-1], "examples_per_second": "examples"}
    medians = [
        f"{number(float(np.nanmedian(run.curves[name].values)))} {unit}/s"
        for name, unit in {**rows, "system/tokens_per_second": "tokens"}.items()
        if name in run.curves
    ]
    if not medians:
        return None
    value, unit = medians[0].split(" ")
    return Headline(value, [", ".join([*medians[1:], "median"])], unit=unit)


def _peak(run: Run, name: str, where: str) -> Headline | None:
    return (
        Headline(number(float(np.nanmax(run.curves[name].values))), [where], unit="GiB") if name in run.curves else None
    )
