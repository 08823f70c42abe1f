"""Rows, and what became of the data, as lines of text."""

from collections.abc import Sequence

import numpy as np

from notus.data.display import LEARNED, LEARNED_END, Pieces, marked, shown
from notus.data_browser.rows import DUPLICATE, OVERLAP, PLAIN, REVERSED, Branch, Data, Row

BOLD, DIM, RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"
_BARS = " ▁▂▃▄▅▆▇█"


def template_lines(data: Data, *, colour: bool = False) -> list[str]:
    """What the rows are, which template renders them, and how what is learned is marked."""
    learned = "in green, special tokens dim" if colour else f"between {LEARNED} and {LEARNED_END}"
    return [
        f"{data.name}, {data.split}: {_rows(len(data))} ({data.task})",
        f"chat template: {data.template[0]}",
        *(f"  {setting}" for setting in data.template[1:]),
        f"what is learned stands {learned}",
    ]


def row_lines(row: Row, pieces: Pieces, *, ids: bool = False, colour: bool = False) -> list[str]:
    """A row as the model sees it."""
    lines = [_bold(f"row {row.index}", colour) + f"  {row.id}  {shown(row.place)}"]
    facts = [f"source {shown(row.source)}"] if row.source else []
    if row.ratings is not None:
        rated = zip(row.names, row.ratings, strict=True)
        facts.append("ratings " + ", ".join(f"{_number(rating)} {name}" for name, rating in rated))
    if row.label is not None:
        facts.append("label true: a good completion" if row.label else "label false: a bad completion")
    if row.margin is not None:
        facts.append(f"reward margin {row.margin:+.4f}")
    if row.flags:
        facts.append("flags: " + ", ".join(row.flags))
    if facts:
        lines.append("; ".join(facts))
    if any(row.cut):
        parts = zip(("the prompt", *row.names), row.cut, strict=True)
        lines.append("cut: " + ", ".join(f"{count:,} tokens of {name}" for name, count in parts if count))
    lines.append(_heading(f"prompt, {_tokens(row.trunk)}", colour))
    lines += _text(Branch(row.trunk, np.zeros(len(row.trunk), bool)), pieces, ids=ids, colour=colour)
    for name, branch in zip(row.names, row.branches, strict=True):
        lines.append(_heading(f"{name}, {_tokens(branch.ids)}, {int(branch.mask.sum()):,} learned", colour))
        lines += _text(branch, pieces, ids=ids, colour=colour)
    return lines


def report_lines(data: Data, *, bars: bool = True) -> list[str]:
    """What reading dropped and cut; duplicates, overlap, ratings, plain text; lengths, also drawn if `bars`."""
    flags, count = data.flag_counts, len(data)
    overlap = "no other split" if data.other is None else f"{flags.get(OVERLAP, 0):,} of a prompt in {data.other_split}"
    reversed_ratings = f", {flags.get(REVERSED, 0):,} with the chosen rated below the rejected"
    rated = reversed_ratings if data.task == "dpo" and data.rows.ratings is not None else ""
    others = {name: n for name, n in flags.items() if name not in (DUPLICATE, OVERLAP, REVERSED, PLAIN)}
    return [
        str(data.report),
        f"{data.split}: {_rows(count)}, {flags.get(DUPLICATE, 0):,} repeat an earlier one, {overlap}{rated}",
        *_row_lines(data),
        f"plain text: {flags.get(PLAIN, 0) / count:.1%}",
        *([", ".join(f"{name}: {n:,}" for name, n in others.items())] if others else []),
        *_length_lines(data, bars),
        *_margin_lines(data),
    ]


def _row_lines(data: Data) -> list[str]:
    """How many completions lists have, or how many labels are true."""
    if data.task == "lists":
        counted = np.bincount(data.rows.branch_counts)
        parts = [f"{number} in {_rows(int(counted[number]))}" for number in np.flatnonzero(counted)]
        return [f"completions: {', '.join(parts)}"]
    if data.rows.labels is not None:
        good = int(data.rows.labels.sum())
        return [f"labels: {good:,} true, {len(data) - good:,} false"]
    return []


def _length_lines(data: Data, bars: bool) -> list[str]:
    lines = [f"{'tokens':<14}{'least':>8}{'median':>8}{'95%':>8}{'most':>8}"]
    for name, values in data.lengths.items():
        least, median, high, most = (int(value) for value in np.percentile(values, [0, 50, 95, 100]))
        histogram = f"  |{spark(data.histograms[name]['counts'])}|" if bars else ""
        lines.append(f"{name:<14}{least:>8,}{median:>8,}{high:>8,}{most:>8,}{histogram}")
    return lines


def _margin_lines(data: Data) -> list[str]:
    if data.margins is None:
        return []
    wrong = int((data.margins < 0).sum())
    judged = "judged" if data.task == "labels" else "ordered"
    return [f"reward margins: mean {data.margins.mean():+.4f}; {wrong:,} of {_rows(len(data))} are {judged} wrongly"]


def spark(counts: Sequence[int]) -> str:
    """Counts as bars, one character each; only 0 is blank."""
    top = max(counts)
    return "".join(_BARS[0 if not count else 1 + round((len(_BARS) - 2) * count / top)] for count in counts)


def _text(branch: Branch, pieces: Pieces, *, ids: bool, colour: bool) -> list[str]:
    lines = [marked(pieces.spans(*branch), colour=colour)]
    return [*lines, f"ids: {_ids(branch)}"] if ids else lines


def _ids(branch: Branch) -> str:
    """Token ids, those that are learned between markers."""
    words: list[str] = []
    inside = False
    for token, learned in zip(branch.ids.tolist(), branch.mask.tolist(), strict=True):
        if inside and not learned:
            words[-1] += LEARNED_END
        words.append(f"{LEARNED}{token}" if learned and not inside else str(token))
        inside = learned
    return " ".join(words) + LEARNED_END * inside


def _bold(text: str, colour: bool) -> str:
    return f"{BOLD}{text}{RESET}" if colour else text


def _heading(text: str, colour: bool) -> str:
    return f"{DIM}--- {text}{RESET}" if colour else f"--- {text}"


def _tokens(ids: np.ndarray) -> str:
    return "1 token" if len(ids) == 1 else f"{len(ids):,} tokens"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"
