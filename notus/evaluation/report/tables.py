"""The parts of the report that are text: facts, headline figures, tables, bars and samples, and how numbers look."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from notus.config import SECTIONS
from notus.evaluation.formatting import NONE, number, setting, short_path, with_error
from notus.evaluation.read_run import Run
from notus.evaluation.report.headlines import TITLES, Headline, headlines
from notus.evaluation.results import Figure, Result
from notus.evaluation.run_loss import RunLoss
from notus.training.run_folder import FREE_KEYS

MOST_SOURCES = 20
LONGEST_LABEL = 40  # characters of a run's name in the keys of the charts
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
    of_all: bool = False  # the values of the first run are those of all


@dataclasses.dataclass(frozen=True)
class Samples:
    """Prompts, each with a completion for every column."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    title: str = ""


def facts(run: Run) -> dict[str, str]:
    """Return what a run is and was made with, by name."""
    training = run.settings["training"]
    found = {
        "Task": _task(run),
        "Base model": short_path(run.base),
        "Data": ", ".join(setting(source) for source in run.settings["data"]["train"]),
        "Steps": _steps(run),
        "Batch": f"{training['batch_size']} {run.unit} a step",
        "Learning rate": f"{setting(training['learning_rate'])}, {training['lr_schedule']}, {training['optimizer']}",
    }
    if run.loss is not None:
        found["Preference loss"] = _loss_in_words(run.loss)
    if run.reference != run.base:
        found["Reference"] = short_path(run.reference)
    if "num_tokens" in run.curves:
        found["Tokens seen"] = number(run.curves["num_tokens"].values[-1])
    if hardware := run.environment.get("hardware"):
        found["Hardware"] = hardware
    if versions := run.environment.get("versions"):
        found["Versions"] = ", ".join(f"{name} {versions[name]}" for name in SHOWN_VERSIONS if name in versions)
    return found


def summary(run: Run) -> str:
    """Return what was done in one line, as "DPO of all weights from …/sft/model: 75 steps of 32 pairs"."""
    batch = f"{run.settings['training']['batch_size']} {run.unit}"
    return f"{_task(run)}, from {short_path(run.base)}: {_steps(run)} steps of {batch}"


def _steps(run: Run) -> str:
    planned = run.planned_steps
    return f"{run.step:,}" + ("" if planned in (None, run.step) else f" of {planned:,}")


def _task(run: Run) -> str:
    """What was done, as "DPO of all weights" or "Preference optimization with lists, of all weights"."""
    rank = run.settings["lora"]["rank"]
    size = f"LoRA of rank {rank}" if rank else "all weights"
    if run.loss is None:
        return f"SFT of {size}"
    is_dpo = run.loss.rows == "pairs" and run.loss.reference
    return f"DPO of {size}" if is_dpo else f"Preference optimization with {run.unit}, of {size}"


def _loss_in_words(loss: RunLoss) -> str:
    """The loss with β, its options and what is added to it."""
    values = {"β": loss.beta, **loss.options, **loss.additions}
    parts = [f"{name} = {setting(value)}" for name, value in values.items()]
    return ", ".join([loss.name, *parts, *([] if loss.reference else ["no reference"])])


def headline_table(runs: Sequence[Run]) -> Table:
    """Return the headline figures of several runs: a row for each run."""
    found = [headlines(run) for run in runs]
    titles = [title for title in TITLES if any(title in of_run for of_run in found)]
    rows: list[list[Cell]] = []
    for run, of_run in zip(runs, found, strict=True):
        cells = [_headline_cell(of_run[title]) if title in of_run else NONE for title in titles]
        rows.append([(run.label, short_path(str(run.folder)) if run.label != run.folder.name else ""), *cells])
    shown = [headline for of_run in found for headline in of_run.values()]
    notes = ["Arrows show the change since the start of training."] if any(each.arrow for each in shown) else []
    notes += ["Ranges are 95% intervals."] if any(each.interval for each in shown) else []
    return Table("Results", ["Run", *titles], rows, " ".join(notes))


def _headline_cell(headline: Headline) -> Cell:
    change = f"{headline.arrow} {headline.change}".strip()
    notes = list(filter(None, [change, headline.interval])) or headline.notes[:1]
    return f"{headline.value} {headline.unit}".strip(), "; ".join(notes)


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
    found = {name: [settings.get(name) for settings in flat] for name in names if name not in FREE_KEYS}
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
    rows = [[name, *_setting_cells(runs, name, values)] for name, values in differing.items()]
    note = "Settings that can't change the result, such as folders and logging, are left out."
    return Table("Settings that differ", ["Setting", *(run.label for run in runs)], rows, note) if rows else None


def _setting_cells(runs: Sequence[Run], name: str, values: Sequence[Any]) -> list[str]:
    """Write a setting of each run; a dash for a run whose config has no such section."""
    section = name.partition(".")[0]
    return [setting(value) if section in run.settings else NONE for run, value in zip(runs, values, strict=True)]


def changed_settings(runs: Sequence[Run]) -> Table | None:
    """Return a table of the settings that are not at their default in any of the runs; None if there are none."""
    flat = [_flat(run.settings) for run in runs]
    default = {f"{section}.{key}": value for section in SECTIONS for key, value in defaults(section).items()}
    names = dict.fromkeys(name for settings in flat for name in settings if name in default)
    rows = []
    for name in names:
        values = [settings.get(name) for settings in flat]
        # The date is recorded in every run.
        if name != "data.template_date" and any(value not in (None, default[name]) for value in values):
            rows.append([name, *_setting_cells(runs, name, values), setting(default[name])])
    columns = ["Setting", *([run.label for run in runs] if len(runs) > 1 else ["Value"]), "Default"]
    return Table("Settings that are not at their default", columns, rows) if rows else None


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
    found = [{key: _row_counts(run.data[key]) for key in ("train", "eval") if run.data.get(key)} for run in runs]
    alike = all(counts == found[0] for counts in found)
    for run, counts in zip(runs[:1] if alike else runs, found, strict=False):
        for key, split in (("train", "train"), ("eval", "held-out")):
            if key in counts:
                columns[split if alike else f"{run.label}: {split}"] = counts[key]
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
    alike = all(counts == sources[0] for counts in sources)
    sources = sources[:1] if alike else sources
    totals: Counter[str] = sum(map(Counter, sources), Counter())
    if not totals:
        return []
    most = max(count for counts in sources for count in counts.values())
    rows: dict[str, list[tuple[int, Cell, float]]] = {
        name: [(i, number(counts[name]), counts[name] / most) for i, counts in enumerate(sources) if name in counts]
        for name, _ in totals.most_common(MOST_SOURCES)
    }
    rest = len(totals) - len(rows)
    note = "Training rows by where they come from." + (f" {rest:,} rarer sources are left out." if rest else "")
    return [Bars("Sources", note, rows, of_all=alike)]


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
            # How preferences are set up is the run's own: its β, and the model it is compared with.
            setup = "" if suite == "preferences" else figure.setup
            key = (figure.name, figure.metric, setup, figure.unit)
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
        setups = {figure.setup for figure in figures[key]}
        setup = setup or (setups.pop() if len(setups) == 1 else "")
        measure = "" if suite == "preferences" else metric  # whose names say it
        how = ", ".join(filter(None, (measure, _short_setup(setup))))
        references = [_reference(figures[key], peer) for peer in published]
        of_each = len(setups) > 1
        cells.append([(title, how), *(_figure_cell(figure, with_setup=of_each) for figure in found), *references])
    when = "; ".join(dict.fromkeys(f"{short_path(result.model)}, {result.date}" for _, result in results))
    note = f"Evaluated: {when}. ± is one standard error, and n is the number of examples."
    columns = ["", *(_result_column(label, result) for label, result in results), *published]
    return Table(SUITES.get(suite, suite), columns, cells, note)


def _short_setup(setup: str) -> str:
    return " ".join(short_path(word) for word in setup.split(" "))


def _result_column(label: str, result: Result) -> str:
    """Return a run's name; for a result of an unfinished run, with its step."""
    _, step, rest = result.model.rpartition(" (step ")
    return f"{label}{step}{rest}" if step else label


def _figure_cell(figure: Figure | None, *, with_setup: bool) -> Cell:
    if figure is None:
        return NONE
    notes = [f"n = {figure.count:,}"] if figure.count else []
    notes += [_short_setup(figure.setup)] if with_setup and figure.setup else []
    # A standard error is 0 if all answers are alike, which says nothing.
    return with_error(figure.value, figure.stderr, figure.unit), ", ".join(notes)


def _reference(figures: Sequence[Figure], peer: str) -> str:
    return next((number(f.reference[peer], f.unit) for f in figures if peer in f.reference), NONE)


def breakdown_bars(runs: Sequence[Run]) -> list[Bars]:
    """Return the accuracy of preferences by source, by length, and by which answer is the longer one.

    Of answers with a label, the AUC by source and by length.
    """
    kinds = {
        "by_source": ("source", "{source}"),
        "by_length": ("length of both answers", "{low:,} to {high:,} tokens"),
        "by_longer": ("which answer is longer", "{longer}"),
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
                if key == "by_longer":
                    label = _longer(label, of_lists=bool(run.preference_details("ranking")))
                group.setdefault(label, []).append((index, *_bar(row, measure)))
        if rows:
            found.append(Bars(f"Accuracy by {title}", "With 95% intervals.", rows))
        if of_labels:
            title = title.replace("both answers", "the answer")
            note = "The probability that a good answer has a higher reward than a bad one, with 95% intervals."
            found.append(Bars(f"AUC by {title}", note, of_labels))
    return found


def _longer(which: str, *, of_lists: bool) -> str:
    """Return which answer is longer in words; of lists no answer was chosen."""
    if which == "neither":
        return "of equal length"
    names = {"chosen": "better rated", "rejected": "worse rated"} if of_lists else {}
    return f"{names.get(which, which)} is longer"


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
        "Rank correlation of margin and length difference": ("length_bias", "spearman"),
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
