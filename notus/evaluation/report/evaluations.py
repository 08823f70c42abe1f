"""Tables of the evaluations in the runs' folders, beside published figures."""

from collections import Counter
from collections.abc import Sequence

from notus.evaluation.report.elements import Cell, Table
from notus.evaluation.report.numbers import number, short_path
from notus.evaluation.report.reading import RunRecord
from notus.evaluation.results import Figure, Result

TITLES = {
    "preferences": "Preferences",
    "win-rate": "Win rate",
    "open-llm": "Open LLM Leaderboard tasks",
    "open-llm-trial": "Open LLM Leaderboard tasks, a trial",
    "alpaca-eval": "AlpacaEval",
    "mt-bench": "MT-Bench",
}


def evaluation_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """One table for each suite, a column for each run that has it, then published models."""
    there = dict.fromkeys(result.suite for run in runs for result in run.results)
    suites = sorted(there, key=lambda suite: list(TITLES).index(suite) if suite in TITLES else len(TITLES))
    return [
        _table(suite, [(run.label, result) for run in runs for result in run.results if result.suite == suite])
        for suite in suites
    ]


def _table(suite: str, results: Sequence[tuple[str, Result]]) -> Table:
    figures = [figure for _, result in results for figure in result.figures]
    rows: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        rows.setdefault(_row(figure), []).append(figure)
    published = dict.fromkeys(name for figure in figures for name in figure.reference)
    names = Counter(name for name, *_ in rows)
    told = [
        [
            (_name(figures[0], names), _how(figures[0])),
            *(_cell(result, row) for _, result in results),
            *(_reference(figures, name) for name in published),
        ]
        for row, figures in rows.items()
    ]
    where = "; ".join(f"{short_path(result.model)}, {result.date}" for _, result in results)
    note = f"{where}. ± is one standard error, n the number of examples."
    return Table(
        TITLES.get(suite, suite), ["", *(_column(label, result) for label, result in results), *published], told, note
    )


def _column(label: str, result: Result) -> str:
    """A run's name; of a result from before its end with the step."""
    _, step, number = result.model.rpartition(" (step ")
    return f"{label}{step}{number}" if step else label


def _name(figure: Figure, names: Counter[str]) -> str:
    """A suite's only figure of a name goes by it; of several, each says what it measures."""
    return figure.name if names[figure.name] == 1 else f"{figure.name}: {figure.metric.replace('_', ' ')}"


def _how(figure: Figure) -> str:
    setup = " ".join(short_path(word) for word in figure.setup.split(" "))
    return ", ".join(filter(None, (figure.metric, setup)))


def _row(figure: Figure) -> tuple[str, ...]:
    return figure.name, figure.metric, figure.setup, figure.unit


def _cell(result: Result, row: tuple[str, ...]) -> Cell:
    for figure in result.figures:
        if _row(figure) == row:
            # of answers that are all alike the standard error is 0, which says nothing
            spread = f" ± {_error(figure.stderr, figure.unit)}" if figure.stderr else ""
            return number(figure.value, figure.unit) + spread, f"n = {figure.count:,}" if figure.count else ""
    return "–"


def _error(value: float, unit: str) -> str:
    return number(value, unit) if unit == "%" else number(float(f"{value:.2g}"))


def _reference(figures: Sequence[Figure], name: str) -> str:
    return next((number(f.reference[name], f.unit) for f in figures if name in f.reference), "–")
