"""The data a run learned from: lengths, ratings, sources, and what was dropped."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from notus.evaluation.report.elements import Bar, Bars, Table
from notus.evaluation.report.numbers import number
from notus.evaluation.report.panels import Panel
from notus.evaluation.report.reading import RunRecord

MOST_SOURCES = 20
CUTS = {
    "prompts_cut": "prompts cut to length",
    "completions_cut": "completions cut to length",
    "templated": "in the chat format",
}


def data_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Histograms of lengths and ratings of the training rows."""
    return [
        *_histograms(runs, "lengths", "Lengths", "Training rows by their number of tokens.", "tokens"),
        *_histograms(runs, "ratings", "Ratings", "Training pairs by the rating of their answers.", "rating"),
    ]


def _histograms(runs: Sequence[RunRecord], group: str, title: str, note: str, axis: str) -> list[Panel]:
    """With one run a single chart of all parts, with several a chart for each part."""
    read = [(run.data.get("train") or {}).get(group) or {} for run in runs]
    found = [{part: h for part, h in histograms.items() if any(h["counts"])} for histograms in read]
    parts = list(dict.fromkeys(part for histograms in found for part in histograms))
    if len(runs) == 1:
        named = [(part, index, found[0][part]) for index, part in enumerate(parts)]
        return [_histogram(group, title, note, axis, named)] if named else []
    panels = []
    for part in parts:
        named = [(run.label, i, found[i][part]) for i, run in enumerate(runs) if part in found[i]]
        panels.append(_histogram(f"{group}-{part}", f"{title}: {part}", note, axis, named))
    return panels


def _histogram(
    name: str, title: str, note: str, axis: str, histograms: Sequence[tuple[str, int, Mapping[str, Any]]]
) -> Panel:
    panel = Panel(name, title, note, "share")
    panel.set_axes(x=axis, rangemode="tozero")
    for label, colour, histogram in histograms:
        counts = histogram["counts"]
        panel.add_outline(histogram["edges"], [count / sum(counts) for count in counts], label, colour=colour)
    return panel


def data_table(runs: Sequence[RunRecord]) -> Table | None:
    """What was read, dropped and cut, by run and split; None if no run tells."""
    told = [(f"{run.label}: {split}" if len(runs) > 1 else split, _counts(part)) for run, split, part in _splits(runs)]
    names = dict.fromkeys(name for _, counts in told for name in counts)
    rows = [[name, *(counts.get(name, "–") for _, counts in told)] for name in names]
    return Table("Rows", ["", *(column for column, _ in told)], rows) if rows else None


def _counts(part: Mapping[str, Any]) -> dict[str, str]:
    """A split's rows, from what was read to what is used."""
    report = part.get("report") or {}
    counts = {words: report[key] for key, words in (("read", "read"), ("kept", "kept")) if key in report}
    counts |= {f"dropped: {reason}": count for reason, count in report.get("dropped", {}).items()}
    counts |= {words: report[key] for key, words in CUTS.items() if key in report}
    return {name: f"{count:,}" for name, count in {**counts, "used": part["rows"]}.items()}


def _splits(runs: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, str, Mapping[str, Any]]]:
    for run in runs:
        for key, split in (("train", "train"), ("eval", "held-out")):
            if run.data.get(key):
                yield run, split, run.data[key]


def source_bars(runs: Sequence[RunRecord]) -> list[Bars]:
    """Training rows by source, the most frequent first; nothing if no run knows them."""
    sources = [(run.data.get("train") or {}).get("sources") or {} for run in runs]
    totals = Counter[str]()
    for counts in sources:
        totals.update(counts)
    if not totals.total():
        return []
    most = max(count for counts in sources for count in counts.values())
    rows = {
        name: [
            Bar(index, number(counts[name]), counts[name] / most)
            for index, counts in enumerate(sources)
            if name in counts
        ]
        for name, _ in totals.most_common(MOST_SOURCES)
    }
    rest = len(totals) - len(rows)
    note = "Training rows by where they come from" + (f"; {rest:,} rarer sources are left out." if rest else ".")
    return [Bars("Sources", note, rows)]
