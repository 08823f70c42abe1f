"""From what the runs measured to the table, and the checks that both sides did the same work."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from common import Outcome, Stored
from notus.model.flops import Dimensions, forward_flops
from trl_search import describe

# prompt, chosen and rejected tokens of one pair
Lengths = tuple[int, int, int]


@dataclass(frozen=True)
class Machine(Stored):
    """The model's sizes and the machine's rate at them.

    Attributes:
        flops_per_second: of the matrix products of a training step.
        size: what the arithmetic follows from.
        parameters: of the whole model.
        description: device, threads and version of torch.
    """

    flops_per_second: float
    size: Dimensions
    parameters: int
    description: str

    @classmethod
    def read(cls, path: str | Path) -> Self:
        stored = json.loads(Path(path).read_text())
        return cls(**{**stored, "size": Dimensions(**stored["size"])})


@dataclass(frozen=True)
class Measured:
    """One run of one side; `options` are what is particular to it."""

    side: str
    epochs: int
    outcome: Outcome
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All runs, the machine's rate as measured between them, why a side did not run, and what the search tried."""

    runs: list[Measured]
    machines: list[Machine]
    num_pairs: int
    batch_size: int
    not_run: dict[str, str] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sides(self) -> list[str]:
        """The sides that ran, in the order of the first round."""
        return list(dict.fromkeys(run.side for run in self.runs))

    @property
    def epochs(self) -> list[int]:
        """The numbers of epochs that were run."""
        return sorted({run.epochs for run in self.runs})

    @property
    def machine(self) -> Machine:
        """The fastest of the measurements, so that no share is flattered by a slow moment."""
        return max(self.machines, key=lambda machine: machine.flops_per_second)

    @property
    def lengths(self) -> list[Lengths]:
        """Tokens of each pair: prompt, chosen, rejected."""
        return [(prompt, chosen, rejected) for prompt, chosen, rejected, _ in self.runs[0].outcome.tokens]

    def outcomes(self, side: str, epochs: int | None = None) -> list[Outcome]:
        """Return a side's outcomes, round by round."""
        return [run.outcome for run in self.runs if run.side == side and epochs in (None, run.epochs)]

    def options(self, side: str, epochs: int) -> dict[str, Any]:
        """Return the options that a side ran with."""
        return next(run.options for run in self.runs if (run.side, run.epochs) == (side, epochs))

    def rates(self, side: str, epochs: int) -> list[list[float]]:
        """Return pairs per second, round by round, of each of `RATES`; NaN for what is not known."""
        pairs, outcomes = self.num_pairs * epochs, self.outcomes(side, epochs)
        return [
            [pairs / outcome.seconds for outcome in outcomes],
            [self._steady(outcome) for outcome in outcomes],
            [pairs / outcome.total_seconds for outcome in outcomes],
        ]

    def _steady(self, outcome: Outcome) -> float:
        """Return pairs per second of the steps after the first; NaN if there was one step."""
        later = outcome.step_seconds[1:]
        return self.batch_size * len(later) / sum(later) if later else math.nan

    def speed(self, side: str, epochs: int) -> float:
        """Return pairs per second, the median of the rounds."""
        return statistics.median(self.rates(side, epochs)[0])

    def ratios(self, first: str, other: str, epochs: int) -> list[list[float]]:
        """Return how many times faster `first` is in each round than `other` is in the same, for each of `RATES`."""
        both = zip(self.rates(first, epochs), self.rates(other, epochs), strict=True)
        return [[a / b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in both]

    def share(self, side: str, epochs: int) -> float:
        """Return necessary arithmetic per second, as a share of the machine's matmul rate."""
        flops = run_flops(self.machine.size, self.lengths, epochs)
        seconds = self.num_pairs * epochs / self.speed(side, epochs)
        return flops / seconds / self.machine.flops_per_second

    def peak(self, side: str, epochs: int | None = None) -> tuple[float, float]:
        """Return MiB: the process's peak, and what of it came after the imports; the largest of the rounds."""
        outcomes = self.outcomes(side, epochs)
        return max(o.peak_mib for o in outcomes), max(o.peak_mib - o.baseline_mib for o in outcomes)


RATES = ("pairs/s", "steady", "with loading")
HEADS = ["", "epochs", *RATES, "peak MiB", "above imports", "share of matmul rate"]


def table(comparison: Comparison, precision: str) -> str:
    """Return what was run, a row per side, the first side against each other one, and the options of the found."""
    machine, pairs = comparison.machine, comparison.lengths
    rates = ", ".join(f"{m.flops_per_second / 1e9:.1f}" for m in comparison.machines)
    lines = [
        f"{machine.parameters / 1e6:.1f}M parameters, {precision}, {comparison.num_pairs} pairs, "
        f"{comparison.batch_size} per step; {machine.description}",
        f"tokens: {shared_tokens(pairs)} with prompts shared, {separate_tokens(pairs)} apart, "
        f"{padded_tokens(pairs, comparison.batch_size)} apart and padded",
        f"matmul rate at these shapes: {rates} GFLOP/s",
        "",
        *_rows(comparison),
        *(f"{side}: not run: {why}" for side, why in comparison.not_run.items()),
    ]
    if "trl-fastest" in comparison.sides:
        lines += [
            f"trl-fastest, {epochs} ep.: {describe(comparison.options('trl-fastest', epochs))}"
            for epochs in comparison.epochs
        ]
    return "\n".join(lines).rstrip()


def _rows(comparison: Comparison) -> list[str]:
    """Return the rows of the sides, and those of the ratios, in columns that are aligned."""
    first, *others = comparison.sides
    sides = [_side_row(comparison, side, n) for side in comparison.sides for n in comparison.epochs]
    ratios = [_ratio_row(comparison, first, other, n) for other in others for n in comparison.epochs]
    lines = aligned([HEADS, *sides, *ratios])
    lines.insert(1 + len(sides), "")
    return lines if ratios else lines[:-1]


def aligned(rows: list[list[str]]) -> list[str]:
    """Return a line per row; the first and the last column begin at the left, those between end at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *middle, last in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells, last]).rstrip())
    return lines


def spread(values: list[float], unit: str = "") -> str:
    """Return the median, and the range if there are several: `2.00x (1.50 to 3.00)`."""
    if any(map(math.isnan, values)):
        return "-"
    median = f"{statistics.median(values):.2f}{unit}"
    return median if len(values) == 1 else f"{median} ({min(values):.2f} to {max(values):.2f})"


def _side_row(comparison: Comparison, side: str, epochs: int) -> list[str]:
    rates = [spread(rates) for rates in comparison.rates(side, epochs)]
    peaks = [f"{mib:.0f}" for mib in comparison.peak(side, epochs)]
    return [side, str(epochs), *rates, *peaks, f"{comparison.share(side, epochs):.0%}"]


def _ratio_row(comparison: Comparison, first: str, other: str, epochs: int) -> list[str]:
    ratios = [spread(ratios, "x") for ratios in comparison.ratios(first, other, epochs)]
    both = zip(comparison.peak(first, epochs), comparison.peak(other, epochs), strict=True)
    peaks = [f"{mine / theirs:.2f}x" for mine, theirs in both]
    steps = len(comparison.outcomes(first, epochs)[0].losses)
    distance = loss_distance(comparison, first, other, epochs)
    return [f"{first} / {other}", str(epochs), *ratios, *peaks, f"losses within {distance:.1e} over {steps} steps"]


def loss_distance(comparison: Comparison, first: str, other: str, epochs: int) -> float:
    """Return the largest difference of two sides' losses at the same step."""
    pairs = zip(comparison.outcomes(first, epochs), comparison.outcomes(other, epochs), strict=True)
    return _largest([_distance(a, b) for a, b in pairs])


def _distance(a: Outcome, b: Outcome) -> float:
    return _largest([abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)])


def _largest(distances: list[float]) -> float:
    """Return the largest, or NaN if there is one: `max` would pass over it."""
    return max(distances, key=lambda distance: math.inf if math.isnan(distance) else distance)


def check_tokens(comparison: Comparison, max_length: int) -> list[str]:
    """Return what is wrong with the tokens: a pair that the sides see differently, or that they would cut."""
    expected = comparison.runs[0].outcome.tokens
    for number, (prompt, chosen, rejected, _) in enumerate(expected, start=1):
        if prompt + max(chosen, rejected) > max_length:
            return [f"pair {number} is longer than --max-length {max_length}: the sides cut differently"]
    for run in comparison.runs:
        rows = itertools.zip_longest(expected, run.outcome.tokens)
        for number, (first, other) in enumerate(rows, start=1):
            if first != other:
                return [f"pair {number}: {first} for {comparison.runs[0].side}, {other} for {run.side}"]
    return []


def check_losses(comparison: Comparison, tolerance: float) -> list[str]:
    """Return the sides whose losses are further than `tolerance` from those of the first side."""
    first, *others = comparison.sides
    return [
        f"{other}, {epochs} epochs: losses differ by more than {tolerance} from those of {first}"
        for other in others
        for epochs in comparison.epochs
        for a, b in zip(comparison.outcomes(first, epochs), comparison.outcomes(other, epochs), strict=True)
        if not _distance(a, b) <= tolerance
    ]


# ---- arithmetic ----


def run_flops(size: Dimensions, pairs: Sequence[Lengths], epochs: int) -> int:
    """The arithmetic that a run cannot do without: `notus/model/flops.py` counts a forward pass of a pair.

    A backward pass is twice a forward pass; the reference is one more forward pass, once. All tokens but the prompts'
    are scored. A shared prompt counts once, padding and recomputation not at all.
    """
    lengths = np.array(pairs)
    trunks, branches = lengths[:, 0], lengths[:, 1:]
    return (3 * epochs + 1) * int(forward_flops(size, trunks, branches, branches.sum(axis=1)).sum())


def shared_tokens(pairs: Sequence[Lengths]) -> int:
    """Tokens with every prompt once."""
    return sum(sum(lengths) for lengths in pairs)


def separate_tokens(pairs: Sequence[Lengths]) -> int:
    """Tokens with every prompt twice, without padding."""
    return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in pairs)


def padded_tokens(pairs: Sequence[Lengths], rows: int) -> int:
    """Tokens of batches of `rows` pairs, chosen and rejected apart, padded to each batch's longest."""
    batches = [pairs[start : start + rows] for start in range(0, len(pairs), rows)]
    return sum(2 * len(batch) * max(p + max(c, r) for p, c, r in batch) for batch in batches)
