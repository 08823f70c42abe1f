"""The parts of the report that are text: facts, headline figures, tables, bars and samples, and how numbers look."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from notus.config import SECTIONS
from notus.evaluation.read_run import Run
from notus.evaluation.results import Figure, Result
from notus.evaluation.run_loss import RunLoss
from notus.training.run_folder import FREE_KEYS

NONE = "–"
MOST_SOURCES = 20
LONGEST_LABEL = 40  # characters of a run's name in the keys of the charts
# Settings that may differ between runs with the same result: where and how a run computes, and what it logs.
WITHOUT_INFLUENCE = FREE_KEYS | {"training.extend"}
SHOWN_VERSIONS = ("torch", "transformers")
SUITES = {
    "preferences": "Preferences",
    "win-rate": "Win rate",
    "open-llm": "Open LLM Leaderboard tasks",
    "open-llm-trial": "Open LLM Leaderboard tasks, a trial",
    "alpaca-eval": "AlpacaEval",
    "mt-bench": "MT-Bench",
}
CUTS = {
    "prompts_cut": "prompts cut to length",
    "completions_cut": "completions cut to length",
    "templated": "in the chat format",
}
LABELS = {"true": "of them good", "false": "of them bad"}
LEFT_OUT = "completions without a rating or text, left out"

Cell = str | tuple[str, str]  # the second string is set small, below the first


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows` of cells under `columns`; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Bars:
    """Named values; each has, for every run that has it: the run's index, the value, and the bar's length (0 to 1)."""

    caption: str
    note: str
    rows: Mapping[str, Sequence[tuple[int, Cell, float]]]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Prompts, each with a completion for every column."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    title: str = ""


def facts(run: Run) -> dict[str, str]:
    """Return what a run is and was made with, by name."""
    training, lora = run.settings["training"], run.settings["lora"]
    size = f"LoRA of rank {lora['rank']}" if lora["rank"] else "all weights"
    planned = f" of {run.planned_steps:,}" if run.planned_steps is not None else ""
    found = {
        "Task": _task(run, size),
        "Base model": short_path(run.base),
        "Steps": f"{run.step:,}{planned}",
        "Batch": f"{training['batch_size']} {run.unit} a step",
        "Learning rate": f"{number(training['learning_rate'])}, {training['lr_schedule']}, {training['optimizer']}",
    }
    if run.loss is not None:
        found["Preference loss"] = _loss_in_words(run.loss)
    if "num_tokens" in run.curves:
        found["Tokens seen"] = number(run.curves["num_tokens"].values[-1])
    if hardware := run.environment.get("hardware"):
        found["Hardware"] = hardware
    if (seconds := run.environment.get("seconds", 0)) >= 1:
        found["Training time"] = duration(seconds)
    if versions := run.environment.get("versions"):
        found["Versions"] = ", ".join(f"{name} {versions[name]}" for name in SHOWN_VERSIONS if name in versions)
    return found


def _task(run: Run, size: str) -> str:
    """What was done, as "DPO of all weights" or "Preference optimization with lists, of all weights"."""
    if run.loss is None:
        return f"SFT of {size}"
    is_dpo = run.loss.rows == "pairs" and run.loss.reference
    return f"DPO of {size}" if is_dpo else f"Preference optimization with {run.unit}, of {size}"


def _loss_in_words(loss: RunLoss) -> str:
    """The loss with β, its options and what is added to it."""
    values = {"β": loss.beta, **loss.options, **loss.additions}
    parts = [f"{name} = {value if isinstance(value, str) else number(value)}" for name, value in values.items()]
    return ", ".join([loss.name, *parts, *([] if loss.reference else ["no reference"])])


def tiles(runs: Sequence[Run]) -> dict[str, list[tuple[int, str, str]]]:
    """Return the headline figures that any run has, by title: each run's index, the figure, and what it is."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    for index, run in enumerate(runs):
        headlines = {
            "Reward accuracy": _latest(run, "rewards/accuracies", "share"),
            "Kendall's τ": _latest(run, "rewards/kendall_tau"),
            "Top-1 accuracy": _latest(run, "rewards/top_1", "share"),
            "Reward margin": _latest(run, "rewards/margins"),
            "Loss": _loss(run),
            "KL": _kl(run),
            "Throughput": _over(run, np.nanmedian, "pairs_per_second", f"{run.unit.split()[-1]}/s, median")
            or _over(run, np.nanmedian, "examples_per_second", "examples/s, median"),
            "Peak memory": _over(run, np.nanmax, "system/gpu_memory_gib", "GiB of a GPU")
            or _over(run, np.nanmax, "system/host_memory_gib", "GiB of the host"),
            "MFU": _over(run, np.nanmedian, "system/mfu", "median", "share"),
        }
        for title, figure in headlines.items():
            entries = found.setdefault(title, [])
            if figure is not None:
                entries.append((index, *figure))
    return {title: entries for title, entries in found.items() if entries}


def _latest(run: Run, name: str, unit: str = "") -> tuple[str, str] | None:
    """Return the last held-out value, or where there is none the last of training."""
    for key, where in ((f"eval_{name}", "held-out"), (name, "train")):
        if key in run.curves:
            known = run.curves[key].known
            return number(known.values[-1], unit), f"{where}, step {known.steps[-1]:,}"
    return None


def _loss(run: Run) -> tuple[str, str] | None:
    latest = _latest(run, "loss")
    if latest is None or "loss" not in run.curves:
        return latest
    first, where = run.curves["loss"].known, "train " if "eval_loss" in run.curves else ""
    return latest[0], f"{latest[1]}; {where}{number(first.values[0])} at step {first.steps[0]:,}"


def _kl(run: Run) -> tuple[str, str] | None:
    found = run.preference_details("kl")
    if not found:
        return None
    # The base of the evaluation need not be the model that the run started from.
    settings = next(result.settings for result in run.results if result.suite == "preferences")
    base = short_path(str(settings.get("base") or "its base"))
    return number(found["per_sequence"]), f"nats per answer, sampled, from {base}"


def _over(
    run: Run, summary: Callable[[np.ndarray], Any], name: str, note: str, unit: str = ""
) -> tuple[str, str] | None:
    """Return a summary of a metric's values over the whole run."""
    return (number(float(summary(run.curves[name].values)), unit), note) if name in run.curves else None


def last_values(runs: Sequence[Run]) -> Table:
    """Return the first and the last value of every metric of every run."""
    columns, cells = ["Metric"], []
    for run in runs:
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        columns += [f"{prefix}first", f"{prefix}last"]
        known = {name: curve.known.values for name, curve in run.curves.items()}
        cells.append({name: (number(values[0]), number(values[-1])) for name, values in known.items()})
    names = sorted({name for run in runs for name in run.curves})
    rows = [[name, *(cell for run in cells for cell in run.get(name, (NONE, NONE)))] for name in names]
    return Table("First and last value of every metric", columns, rows)


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, as `{"section.key": [one value per run]}`; empty if none do.

    Args:
        configs: each run's resolved config, `{section: {key: value}}`. A key that a config of an earlier version lacks
            has its default. A whole section that a config lacks (SFT has no `dpo`) gives None.

    Keys that don't influence the result, such as `training.output_dir`, are left out.
    """
    flat = [_flat(config) for config in configs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    found = {name: [settings.get(name) for settings in flat] for name in names if name not in WITHOUT_INFLUENCE}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config by "section.key", with the default of every key that its sections lack."""
    return {
        f"{section}.{key}": value
        for section, values in config.items()
        for key, value in {**defaults(section), **values}.items()
    }


def defaults(section: str) -> dict[str, Any]:
    """Return the defaults of a config section; none for a required key, or a section that does not exist."""
    found = {}
    for item in dataclasses.fields(SECTIONS[section]) if section in SECTIONS else ():
        if item.default is not dataclasses.MISSING:
            found[item.name.rstrip("_")] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            found[item.name.rstrip("_")] = item.default_factory()
    return found


def setting(value: Any) -> str:
    """Write a setting's value as a user would: `5e-7`, `true`, `null`, `q_proj, v_proj`, a source by its path."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.10g}")
    if isinstance(value, Mapping):
        if set(value) == {"path", "split", "weight"}:
            return _source(value)
        return ", ".join(f"{name}: {setting(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    return short_path(str(value))


def _source(source: Mapping[str, Any]) -> str:
    """Write a source of rows: its path, and what is not as usual."""
    split = "" if source["split"] == "train" else f", split {source['split']}"
    weight = "" if source["weight"] == 1 else f", weight {setting(source['weight'])}"
    return f"{short_path(str(source['path']))}{split}{weight}"


def with_labels(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each called by the settings that set it apart, as "beta 0.05".

    They keep the names of their folders if these labels would be long, or the same for two runs.
    """
    differing = differing_settings([run.settings for run in runs])
    differing.pop("data.template_date", None)  # the day of the run
    keys = Counter(name.rpartition(".")[2] for name in differing)
    labels = []
    for index in range(len(runs)):
        parts = []
        for name, values in differing.items():
            key = name.rpartition(".")[2]
            parts.append(f"{key if keys[key] == 1 else name} {setting(values[index])}")
        labels.append(", ".join(parts))
    if len(set(labels)) < len(runs) or any(not 0 < len(label) <= LONGEST_LABEL for label in labels):
        return list(runs)
    return [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def differing_table(runs: Sequence[Run]) -> Table | None:
    """Return a table of the settings in which runs differ; None for one run, or if none differ."""
    differing = differing_settings([run.settings for run in runs])
    rows = [[name, *map(setting, values)] for name, values in differing.items()]
    note = "Settings that can't change the result, such as folders and logging, are left out."
    return Table("Settings that differ", ["Setting", *(run.label for run in runs)], rows, note) if rows else None


def _by_name(
    caption: str, columns: Mapping[str, Mapping[str, str]], *, first: str = "", note: str = ""
) -> Table | None:
    """Return a table with a row for every name that any column has; None if there is no row."""
    names = dict.fromkeys(name for cells in columns.values() for name in cells)
    rows = [[name, *(cells.get(name, NONE) for cells in columns.values())] for name in names]
    return Table(caption, [first, *columns], rows, note) if rows else None


def data_table(runs: Sequence[Run]) -> Table | None:
    """Return what was read, dropped and cut, by run and split; None if no run has it."""
    columns = {}
    for run in runs:
        for key, split in (("train", "train"), ("eval", "held-out")):
            if part := run.data.get(key):
                columns[f"{run.label}: {split}" if len(runs) > 1 else split] = _row_counts(part)
    return _by_name("Rows", columns)


def _row_counts(part: Mapping[str, Any]) -> dict[str, str]:
    """Return a split's rows, from what was read to what is used."""
    report = part.get("report") or {}
    counts = {key: report[key] for key in ("read", "kept") if key in report}
    counts |= {f"dropped: {reason}": count for reason, count in report.get("dropped", {}).items()}
    counts |= {words: report[key] for key, words in CUTS.items() if key in report}
    if report.get("left_out"):
        counts[LEFT_OUT] = report["left_out"]
    labels = part.get("labels") or {}
    counts |= {"used": part["rows"], **{LABELS[name]: count for name, count in labels.items()}}
    return {name: f"{count:,}" for name, count in counts.items()}


def source_bars(runs: Sequence[Run]) -> list[Bars]:
    """Return training rows by source, the most frequent first; nothing if no run knows them."""
    sources = [(run.data.get("train") or {}).get("sources") or {} for run in runs]
    totals: Counter[str] = sum(map(Counter, sources), Counter())
    if not totals:
        return []
    most = max(count for counts in sources for count in counts.values())
    rows: dict[str, list[tuple[int, Cell, float]]] = {
        name: [(i, number(counts[name]), counts[name] / most) for i, counts in enumerate(sources) if name in counts]
        for name, _ in totals.most_common(MOST_SOURCES)
    }
    rest = len(totals) - len(rows)
    note = "Training rows by where they come from" + (f"; {rest:,} rarer sources are left out." if rest else ".")
    return [Bars("Sources", note, rows)]


def evaluation_tables(runs: Sequence[Run]) -> list[Table]:
    """Return a table for each suite: a column for each run that has it, then the published models."""
    found = dict.fromkeys(result.suite for run in runs for result in run.results)
    suites = sorted(found, key=lambda suite: list(SUITES).index(suite) if suite in SUITES else len(SUITES))
    return [
        _suite_table(suite, [(run.label, result) for run in runs for result in run.results if result.suite == suite])
        for suite in suites
    ]


def _suite_table(suite: str, results: Sequence[tuple[str, Result]]) -> Table:
    rows: dict[tuple[str, str, str, str], list[Figure | None]] = {}  # a figure for each result that has it
    for index, (_, result) in enumerate(results):
        for figure in result.figures:
            key = (figure.name, figure.metric, figure.setup, figure.unit)
            found = rows.setdefault(key, [None] * len(results))
            found[index] = found[index] or figure
    figures = {key: [figure for figure in found if figure is not None] for key, found in rows.items()}
    published = dict.fromkeys(name for _, result in results for figure in result.figures for name in figure.reference)
    names = Counter(name for name, *_ in rows)
    cells = []
    for key, found in rows.items():
        name, metric, setup, _ = key
        # The only figure of a name goes by it; of several, each says what it measures.
        title = name if names[name] == 1 else f"{name}: {metric.replace('_', ' ')}"
        how = ", ".join(filter(None, (metric, " ".join(short_path(word) for word in setup.split(" ")))))
        references = [_reference(figures[key], peer) for peer in published]
        cells.append([(title, how), *(_figure_cell(figure) for figure in found), *references])
    models = "; ".join(f"{short_path(result.model)}, {result.date}" for _, result in results)
    note = f"{models}. ± is one standard error, n the number of examples."
    columns = ["", *(_result_column(label, result) for label, result in results), *published]
    return Table(SUITES.get(suite, suite), columns, cells, note)


def _result_column(label: str, result: Result) -> str:
    """Return a run's name; for a result of an unfinished run, with its step."""
    _, step, rest = result.model.rpartition(" (step ")
    return f"{label}{step}{rest}" if step else label


def _figure_cell(figure: Figure | None) -> Cell:
    if figure is None:
        return NONE
    value = number(figure.value, figure.unit)
    if figure.stderr:  # 0 if all answers are alike, which says nothing
        rounded = figure.stderr if figure.unit == "%" else float(f"{figure.stderr:.2g}")
        value += f" ± {number(rounded, figure.unit)}"
    return value, f"n = {figure.count:,}" if figure.count else ""


def _reference(figures: Sequence[Figure], peer: str) -> str:
    return next((number(f.reference[peer], f.unit) for f in figures if peer in f.reference), NONE)


def breakdown_bars(runs: Sequence[Run]) -> list[Bars]:
    """Return the accuracy of preferences by source, by length, and by which answer is the longer one.

    Of answers with a label, the AUC by source and by length.
    """
    kinds = {
        "by_source": ("source", "{source}"),
        "by_length": ("length of both answers", "{low:,} to {high:,} tokens"),
        "by_longer": ("longer answer", "{longer}"),
    }
    found = []
    for key, (title, name) in kinds.items():
        rows: dict[str, list[tuple[int, Cell, float]]] = {}
        of_labels: dict[str, list[tuple[int, Cell, float]]] = {}
        for index, run in enumerate(runs):
            for row in (run.preference_details(key) or [])[:MOST_SOURCES]:
                measure, group = ("auc", of_labels) if "auc" in row else ("accuracy", rows)
                if row[measure] is None:  # of one label alone there is no AUC
                    continue
                label = name.format(**row)
                if run.preference_details("ranking"):  # of lists no answer was chosen
                    label = {"chosen": "better rated", "rejected": "worse rated"}.get(label, label)
                group.setdefault(label, []).append((index, *_bar(row, measure)))
        if rows:
            found.append(Bars(f"Accuracy by {title}", "With 95% intervals.", rows))
        if of_labels:
            title = title.replace("both answers", "the answer")
            note = "The probability that a good answer has a higher reward than a bad one, with 95% intervals."
            found.append(Bars(f"AUC by {title}", note, of_labels))
    return found


def _bar(row: Mapping[str, Any], measure: str) -> tuple[Cell, float]:
    """A share with its interval, and the bar's length."""
    low, high = row[f"{measure}_interval"]
    return (number(row[measure], "share"), f"{100 * low:.0f}–{100 * high:.0f}%, n = {row['count']:,}"), row[measure]


def preference_table(runs: Sequence[Run]) -> Table | None:
    """Return the figures of the preferences suite that are no headlines; None if there are none."""
    parts = {
        "Top-1 accuracy of a random choice": ("ranking", "top_1_chance"),
        "Brier score (0.25 is chance)": ("calibration", "brier"),
        "β at which it is calibrated best": ("calibration", "best_beta"),
        "Correlation of margin and length difference": ("length_bias", "pearson"),
        "The same, of ranks": ("length_bias", "spearman"),
        "Margin per token of difference": ("length_bias", "slope_per_token"),
        "Margin at equal length": ("length_bias", "margin_at_equal_length"),
        "KL to the base per token, nats, sampled": ("kl", "per_token"),
    }
    columns = {}
    for run in runs:
        values = {name: (run.preference_details(part) or {}).get(key) for name, (part, key) in parts.items()}
        if cells := {name: number(value) for name, value in values.items() if value is not None}:
            columns[run.label] = cells
    note = "Length difference: tokens of the chosen (of a list, the better) answer minus those of the other."
    return _by_name("Calibration, length bias, KL", columns, note=note)


def sample_groups(runs: Sequence[Run]) -> list[Samples]:
    """Return the last answers of several runs to the same prompts; else each run's answers before and after."""
    written = [run for run in runs if run.samples]
    last = [{found[-1].prompt: found[-1] for found in run.samples} for run in written]
    shared = [prompt for prompt in last[0] if all(prompt in of_run for of_run in last)] if last else []
    if len(written) > 1 and shared:
        steps = [max(sample.step for sample in of_run.values()) for of_run in last]
        columns = [f"{run.label}, step {step:,}" for run, step in zip(written, steps, strict=True)]
        return [Samples(columns, [(prompt, [of_run[prompt].completion for of_run in last]) for prompt in shared])]
    return [_before_and_after(run, run.label if len(runs) > 1 else "") for run in written]


def _before_and_after(run: Run, title: str) -> Samples:
    steps = {sample.step for found in run.samples for sample in (found[0], found[-1])}
    ends = sorted({min(steps), max(steps)})
    columns = ["Before training" if step == 0 else f"After step {step:,}" for step in ends]
    rows = [(found[0].prompt, [found[0].completion, found[-1].completion][: len(found)]) for found in run.samples]
    # A step that is still being written lacks some prompts.
    return Samples(columns, [row for row in rows if len(row[1]) == len(columns)], title)


def number(value: float, unit: str = "") -> str:
    """Write a number with four figures; `unit` "%" takes a percentage, "share" a share of 1. A dash if not finite."""
    if not math.isfinite(value):
        return NONE
    return ("−" if value < 0 else "") + _positive(abs(value), unit)


def _positive(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f}%"
    if unit == "%":
        return f"{value:.2f}%"
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    if value < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Write a duration in its two greatest units, as "1 h 52 min"."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{:,} h {} min".format(*divmod(round(seconds / 60), 60))


def short_path(path: str) -> str:
    """Return the end of a long path on this machine; anything else as it is."""
    parts = PurePath(path).parts
    return "…/" + "/".join(parts[-2:]) if path.startswith("/") and len(parts) > 3 else path
