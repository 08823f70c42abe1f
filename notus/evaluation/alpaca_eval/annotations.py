"""AlpacaEval's annotation files, and the scores of what stands in them; needs no package but Python's own."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

TEXTS = ("instruction", "output_2", "generator_2")
PAIR = ("dataset", "instruction", "output_1", "output_2", "annotator")


@dataclasses.dataclass(frozen=True)
class Annotation:
    """A judge's verdict on one pair: `preference` from 1 (the baseline is better) to 2; None: there is none."""

    instruction: str
    output: str
    generator: str
    baseline: str
    annotator: str
    preference: float | None


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a file of annotations says.

    Attributes:
        win_rate: mean of preference - 1 in percent, as the package has it.
        standard_error: of `win_rate`, in percent: the sample's standard deviation over √count, as the package has it.
        discrete_win_rate: wins and half of the ties in percent of `count`, the package's too. The same where every
            preference is 1, 1.5 or 2, as the judges of AlpacaEval 1 give them; those of AlpacaEval 2 weigh.
        discrete_standard_error: of `discrete_win_rate`, in percent.
        wins, losses, ties: preferences above, below and at 1.5.
        count: annotated entries, the sum of these three.
        left_out: entries without a preference.
        average_length: mean of the model's outputs in characters, of entries left out too, cut to an integer as the
            package does.
    """

    win_rate: float
    standard_error: float | None
    discrete_win_rate: float
    discrete_standard_error: float | None
    wins: int
    losses: int
    ties: int
    count: int
    left_out: int
    average_length: int


def read_annotations(path: Path) -> list[Annotation]:
    """Read a JSON list of annotations of one model, AlpacaEval's `annotations.json`.

    A preference of null or NaN is none; 0, with which old annotators told a tie, is 1.5, as for the package.

    Raises:
        ValueError: naming file and entry: a key is missing, a preference is out of range, two models, the same pair
            twice; or no entry has a preference.
    """
    values = _read(path)
    entries = [_parse(value, f"{path}, entry {number}") for number, value in enumerate(values, start=1)]
    seen: dict[tuple[str, ...], int] = {}
    for number, (value, entry) in enumerate(zip(values, entries, strict=True), start=1):
        if entry.generator != entries[0].generator:
            raise ValueError(
                f"{path}, entry {number}: generator_2 is {entry.generator!r}, that of entry 1 is "
                f"{entries[0].generator!r}; give each model a file of its own"
            )
        pair = tuple(f"{value.get(key)}" for key in PAIR)
        if pair in seen:
            raise ValueError(f"{path}, entry {number}: repeats entry {seen[pair]}; remove one of them")
        seen[pair] = number
    if all(entry.preference is None for entry in entries):
        raise ValueError(f"{path}: none of its {len(entries)} entries has a preference; have them judged first")
    return entries


def score(annotations: Sequence[Annotation]) -> Scores:
    """Score annotations of one model, at least one of which has a preference."""
    preferences = [entry.preference for entry in annotations if entry.preference is not None]
    wins = [1.0 if preference > 1.5 else 0.5 if preference == 1.5 else 0.0 for preference in preferences]
    return Scores(
        win_rate=100 * fmean(preference - 1 for preference in preferences),
        standard_error=_standard_error(preferences),
        discrete_win_rate=100 * fmean(wins),
        discrete_standard_error=_standard_error(wins),
        wins=wins.count(1.0),
        losses=wins.count(0.0),
        ties=wins.count(0.5),
        count=len(wins),
        left_out=len(annotations) - len(wins),
        average_length=int(fmean(len(entry.output) for entry in annotations)),
    )


def _standard_error(values: list[float]) -> float | None:
    """In percent; of a single value it is not known."""
    return 100 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _read(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); give AlpacaEval's annotations.json") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: holds no JSON list but one {type(entries).__name__}; give AlpacaEval's list")
    if not entries:
        raise ValueError(f"{path}: an empty list; there is nothing to score")
    return entries


def _parse(value: Any, place: str) -> Annotation:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {type(value).__name__}, not an object; give AlpacaEval's annotations.json")
    missing = [key for key in (*TEXTS, "preference") if key not in value]
    if missing:
        raise ValueError(f"{place}: has no key {missing[0]!r}; give AlpacaEval's annotations.json")
    for key in TEXTS:
        if not isinstance(value[key], str):
            raise ValueError(f"{place}: {key} is no text but {type(value[key]).__name__}")
    return Annotation(
        instruction=value["instruction"],
        output=value["output_2"],
        generator=value["generator_2"],
        baseline=str(value.get("generator_1") or "unknown"),
        annotator=str(value.get("annotator") or "unknown"),
        preference=_preference(value["preference"], place),
    )


def _preference(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place}: the preference is no number but {type(value).__name__}")
    if value != value:  # NaN, as the package writes it
        return None
    if value == 0:
        return 1.5
    if not 1 <= value <= 2:
        raise ValueError(f"{place}: the preference {str(value)[:20]} is out of range; it goes from 1 to 2, or is null")
    return float(value)
