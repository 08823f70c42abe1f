"""What the preferences suite tells beyond its headline figures: calibration, breakdowns, length bias, sampled KL.

Its `details` hold what could be computed, so each part is shown where it is there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from notus.evaluation.report.elements import Bar, Bars, Table
from notus.evaluation.report.numbers import number
from notus.evaluation.report.panels import Panel
from notus.evaluation.report.reading import RunRecord

MOST_ROWS = 20  # sources, the most frequent of which come first
Row = Mapping[str, Any]


def calibration_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Confidence against frequency, a line for each run."""
    panel = Panel(
        "calibration", "Calibration", "σ(margin) of the answer that the model prefers, against how often that is the "
        "chosen one, with 95% intervals. On the dotted line the model is as sure as it is right.", "share",
    )  # fmt: skip
    panel.set_axes(x="confidence", range=[0, 1.03])
    panel.figure.update_layout(hovermode="closest", xaxis={"tickformat": ".0%", "range": [0.49, 1.02]})
    panel.add_diagonal(0.5, 1.0)
    for colour, run in enumerate(runs):
        if bins := (run.preference_details("calibration") or {}).get("bins"):
            panel.add_points(
                [entry["confidence"] for entry in bins],
                [entry["frequency"] for entry in bins],
                run.label if len(runs) > 1 else "held-out pairs",
                colour=colour,
                intervals=[entry["interval"] for entry in bins],
            )
    return [panel] if panel.keys else []


def breakdown_bars(runs: Sequence[RunRecord]) -> list[Bars]:
    """Accuracy by source, by length, and by which answer is the longer one."""
    kinds: dict[str, tuple[str, Callable[[Row], str]]] = {
        "by_source": ("source", lambda row: str(row["source"])),
        "by_length": ("length of both answers", lambda row: f"{row['low']:,} to {row['high']:,} tokens"),
        "by_longer": ("longer answer", lambda row: str(row["longer"])),
    }
    found = []
    for key, (title, name) in kinds.items():
        rows: dict[str, list[Bar]] = {}
        for index, run in enumerate(runs):
            for row in (run.preference_details(key) or [])[:MOST_ROWS]:
                bar = Bar(index, (number(row["accuracy"], "share"), _spread(row)), row["accuracy"])
                rows.setdefault(name(row), []).append(bar)
        if rows:
            found.append(Bars(f"Accuracy by {title}", "With 95% intervals.", rows))
    return found


def _spread(row: Row) -> str:
    low, high = row["accuracy_interval"]
    return f"{100 * low:.0f}–{100 * high:.0f}%, n = {row['count']:,}"


def detail_table(runs: Sequence[RunRecord]) -> Table | None:
    """Single figures that are no headlines of the suite, a column for each run; None if there are none."""
    told = [(run.label, _figures(run)) for run in runs]
    shown = [(label, figures) for label, figures in told if figures]
    names = dict.fromkeys(name for _, figures in shown for name in figures)
    rows = [[name, *(figures.get(name, "–") for _, figures in shown)] for name in names]
    note = "Length difference: tokens of the chosen minus those of the rejected answer."
    return Table("Calibration, length bias, KL", ["", *(label for label, _ in shown)], rows, note) if rows else None


def _figures(run: RunRecord) -> dict[str, str]:
    parts = {
        "Brier score (0.25 is chance)": ("calibration", "brier", ""),
        "β at which it is calibrated best": ("calibration", "best_beta", ""),
        "Correlation of margin and length difference": ("length_bias", "pearson", ""),
        "The same, of ranks": ("length_bias", "spearman", ""),
        "Margin per token of difference": ("length_bias", "slope_per_token", ""),
        "Margin at equal length": ("length_bias", "margin_at_equal_length", ""),
        "KL to the base per token, nats, sampled": ("kl", "per_token", ""),
    }
    values = {name: ((run.preference_details(part) or {}).get(key), unit) for name, (part, key, unit) in parts.items()}
    return {name: number(value, unit) for name, (value, unit) in values.items() if value is not None}
