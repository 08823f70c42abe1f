"""What a run is, where it stands, and how it differs from the others: facts, headline figures, tables."""

from collections.abc import Callable, Sequence

import numpy as np

from notus.evaluation.report.elements import Table, Tile
from notus.evaluation.report.numbers import duration, number, short_path
from notus.evaluation.report.reading import RunRecord

SHOWN_VERSIONS = ("torch", "transformers")


def facts(run: RunRecord) -> dict[str, str]:
    """What a run is and was made with, by name."""
    training, lora = run.settings["training"], run.settings["lora"]
    unit = "pairs" if run.task == "dpo" else "examples"
    size = f"LoRA of rank {lora['rank']}" if lora["rank"] else "all weights"
    found = {
        "Task": f"{run.task.upper()} of {size}",
        "Base model": short_path(run.settings["model"]["name_or_path"]),
        "Steps": _steps(run),
        "Batch": f"{training['batch_size']} {unit} a step",
        "Learning rate": f"{number(training['learning_rate'])}, {training['lr_schedule']}, {training['optimizer']}",
    }
    if run.task == "dpo":
        found["Preference loss"] = f"{run.settings['dpo']['loss_type']}, β = {number(run.settings['dpo']['beta'])}"
    if "num_tokens" in run.curves:
        found["Tokens seen"] = number(run.curves["num_tokens"].values[-1])
    if hardware := run.environment.get("hardware"):
        found["Hardware"] = hardware
    if (seconds := run.environment.get("seconds", 0)) >= 1:  # of a run's first moments there is nothing to tell
        found["Training time"] = duration(seconds)
    if versions := run.environment.get("versions"):
        found["Versions"] = ", ".join(f"{name} {versions[name]}" for name in SHOWN_VERSIONS if name in versions)
    return found


def _steps(run: RunRecord) -> str:
    planned = run.planned_steps
    return f"{run.step:,} of {planned:,}" if planned is not None else f"{run.step:,}"


def tiles(runs: Sequence[RunRecord]) -> list[Tile]:
    """The headline figures that any run has."""
    makers: dict[str, Callable[[RunRecord], tuple[str, str] | None]] = {
        "Reward accuracy": lambda run: _latest(run, "rewards/accuracies", "share"),
        "Reward margin": lambda run: _latest(run, "rewards/margins"),
        "Loss": _loss,
        "KL": _kl,
        "Throughput": _throughput,
        "Peak memory": _memory,
        "MFU": lambda run: _median(run, "system/mfu", "share", "median"),
    }
    found = [
        Tile(title, [(index, *told) for index, run in enumerate(runs) if (told := maker(run)) is not None])
        for title, maker in makers.items()
    ]
    return [tile for tile in found if tile.entries]


def _latest(run: RunRecord, name: str, unit: str = "") -> tuple[str, str] | None:
    """The last held-out value, or where there is none the last of training."""
    for key, where in ((f"eval_{name}", "held-out"), (name, "train")):
        if key in run.curves:
            known = run.curves[key].known
            return number(known.values[-1], unit), f"{where}, step {known.steps[-1]:,}"
    return None


def _loss(run: RunRecord) -> tuple[str, str] | None:
    latest = _latest(run, "loss")
    if latest is None or "loss" not in run.curves:
        return latest
    first, where = run.curves["loss"].known, "train " if "eval_loss" in run.curves else ""  # beside a held-out one
    return latest[0], f"{latest[1]}; {where}{number(first.values[0])} at step {first.steps[0]:,}"


def _kl(run: RunRecord) -> tuple[str, str] | None:
    found = run.preference_details("kl")
    return (number(found["per_sequence"]), f"nats per answer, sampled, from {_base(run)}") if found else None


def _base(run: RunRecord) -> str:
    """What the preferences suite held the model against, which need not be what it was trained from."""
    settings = next(result.settings for result in run.results if result.suite == "preferences")
    return short_path(str(settings.get("base") or "its base"))


def _throughput(run: RunRecord) -> tuple[str, str] | None:
    return _median(run, "pairs_per_second", "", "pairs/s, median") or _median(
        run, "examples_per_second", "", "examples/s, median"
    )


def _median(run: RunRecord, name: str, unit: str, note: str) -> tuple[str, str] | None:
    return (number(float(np.nanmedian(run.curves[name].values)), unit), note) if name in run.curves else None


def _memory(run: RunRecord) -> tuple[str, str] | None:
    for name, place in (("system/gpu_memory_gib", "a GPU"), ("system/host_memory_gib", "the host")):
        if name in run.curves:
            return number(float(np.nanmax(run.curves[name].values))), f"GiB of {place}"
    return None


def last_values(runs: Sequence[RunRecord]) -> Table:
    """Every metric of every run: where it began and where it is."""
    names = sorted({name for run in runs for name in run.curves})
    columns = ["Metric"]
    for run in runs:
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        columns += [f"{prefix}first", f"{prefix}last"]
    rows = [[name, *(cell for run in runs for cell in _ends(run, name))] for name in names]
    return Table("First and last value of every metric", columns, rows)


def _ends(run: RunRecord, name: str) -> tuple[str, str]:
    if name not in run.curves:
        return "–", "–"
    known = run.curves[name].known.values
    return number(known[0]), number(known[-1])


def differing_settings(runs: Sequence[RunRecord]) -> Table | None:
    """The settings in which runs differ; None for one run, or none that differ."""
    flat = [
        {f"{section}.{key}": str(value) for section, values in run.settings.items() for key, value in values.items()}
        for run in runs
    ]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [[name, *(s.get(name, "–") for s in flat)] for name in names if len({s.get(name) for s in flat}) > 1]
    return Table("Settings that differ", ["Setting", *(run.label for run in runs)], rows) if rows else None
