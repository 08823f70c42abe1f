"""From what the runs measured to the table, and the checks that both sides did the same work."""

import itertools
import math
import statistics
from dataclasses import dataclass, field

from arithmetic import Lengths, padded_tokens, run_flops, separate_tokens, shared_tokens
from job import Machine, Outcome


@dataclass(frozen=True)
class Measured:
    """One run of one side."""

    side: str
    epochs: int
    outcome: Outcome


@dataclass(frozen=True)
class Comparison:
    """All runs, the machine's rate as measured between them, and why a side did not run."""

    runs: list[Measured]
    machines: list[Machine]
    num_pairs: int
    batch_size: int
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def sides(self) -> list[str]:
        return list(dict.fromkeys(run.side for run in self.runs))

    @property
    def epochs(self) -> list[int]:
        return sorted({run.epochs for run in self.runs})

    @property
    def machine(self) -> Machine:
        """The fastest of the measurements, so that no share is flattered by a slow moment."""
        return max(self.machines, key=lambda machine: machine.flops_per_second)

    @property
    def lengths(self) -> list[Lengths]:
        return [(prompt, chosen, rejected) for prompt, chosen, rejected, _ in self.runs[0].outcome.tokens]

    def outcomes(self, side: str, epochs: int | None = None) -> list[Outcome]:
        return [run.outcome for run in self.runs if run.side == side and epochs in (None, run.epochs)]

    def speed(self, side: str, epochs: int) -> float:
        """Pairs per second, the median of the repeats."""
        seconds = statistics.median(outcome.seconds for outcome in self.outcomes(side, epochs))
        return self.num_pairs * epochs / seconds

    def steady(self, side: str, epochs: int) -> float | None:
        """Pairs per second of the steps after the first, the median of the repeats; None if there was one step."""
        later = [outcome.step_seconds[1:] for outcome in self.outcomes(side, epochs)]
        return statistics.median(self.batch_size * len(steps) / sum(steps) for steps in later) if later[0] else None

    def share(self, side: str, epochs: int) -> float:
        """Necessary arithmetic per second, as a share of the machine's matmul rate."""
        flops = run_flops(self.machine.size, self.lengths, epochs)
        seconds = self.num_pairs * epochs / self.speed(side, epochs)
        return flops / seconds / self.machine.flops_per_second

    def peak(self, side: str) -> tuple[float, float]:
        """MiB: the process's peak, and what of it came after the imports."""
        outcomes = self.outcomes(side)
        return max(o.peak_mib for o in outcomes), max(o.peak_mib - o.baseline_mib for o in outcomes)


def table(comparison: Comparison, precision: str) -> str:
    """What was run, a row per side, and each other side against the first."""
    machine, pairs = comparison.machine, comparison.lengths
    rates = ", ".join(f"{m.flops_per_second / 1e9:.1f}" for m in comparison.machines)
    lines = [
        f"{machine.parameters / 1e6:.1f}M parameters, {precision}, {comparison.num_pairs} pairs, "
        f"{comparison.batch_size} per step; {machine.description}",
        f"tokens: {shared_tokens(pairs)} with prompts shared, {separate_tokens(pairs)} apart, "
        f"{padded_tokens(pairs, comparison.batch_size)} apart and padded",
        f"matmul rate at these shapes: {rates} GFLOP/s",
        "",
        _heading(comparison.epochs),
        *(_side_row(comparison, side) for side in comparison.sides),
        *(f"{side:<28}   not run: {why}" for side, why in comparison.not_run.items()),
        "",
        *(_ratio_row(comparison, side) for side in comparison.sides[1:]),
    ]
    return "\n".join(lines).rstrip()


def _row(name: str, speeds: list[str], peaks: list[str], last: str) -> str:
    return f"{name:<28}" + "".join(f"{cell:>15}" for cell in [*speeds, *peaks]) + f"   {last}"


def _heading(epochs: list[int]) -> str:
    speeds = [f"pairs/s, {number} ep." for number in epochs]
    return _row("", [*speeds, f"steady, {epochs[-1]} ep."], ["peak MiB", "above imports"], "share of matmul rate")


def _side_row(comparison: Comparison, side: str) -> str:
    speeds = [f"{comparison.speed(side, epochs):.2f}" for epochs in comparison.epochs]
    shares = ", ".join(f"{comparison.share(side, epochs):.0%}" for epochs in comparison.epochs)
    steady = comparison.steady(side, comparison.epochs[-1])
    speeds.append("-" if steady is None else f"{steady:.2f}")
    return _row(side, speeds, [f"{mib:.0f}" for mib in comparison.peak(side)], shares)


def _ratio_row(comparison: Comparison, other: str) -> str:
    first = comparison.sides[0]
    speeds = [f"{comparison.speed(first, n) / comparison.speed(other, n):.2f}x" for n in comparison.epochs]
    peaks = [f"{a / b:.2f}x" for a, b in zip(comparison.peak(first), comparison.peak(other), strict=True)]
    steady = [comparison.steady(side, comparison.epochs[-1]) for side in (first, other)]
    speeds.append("-" if None in steady else f"{steady[0] / steady[1]:.2f}x")
    return _row(f"{first} / {other}", speeds, peaks, _loss_difference(comparison, first, other))


def _loss_difference(comparison: Comparison, first: str, other: str) -> str:
    steps = max(len(outcome.losses) for outcome in comparison.outcomes(first))
    largest = _largest([loss_distance(comparison, first, other, epochs) for epochs in comparison.epochs])
    return f"losses within {largest:.1e} over {steps} steps"


def loss_distance(comparison: Comparison, first: str, other: str, epochs: int) -> float:
    """The largest difference of two sides' losses at the same step."""
    pairs = zip(comparison.outcomes(first, epochs), comparison.outcomes(other, epochs), strict=True)
    return _largest([_distance(a, b) for a, b in pairs])


def _distance(a: Outcome, b: Outcome) -> float:
    return _largest([abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)])


def _largest(distances: list[float]) -> float:
    """The largest, or NaN if there is one: `max` would pass over it."""
    return max(distances, key=lambda distance: math.inf if math.isnan(distance) else distance)


def check_tokens(comparison: Comparison, max_length: int) -> list[str]:
    """What is wrong with the tokens: a pair that the sides see differently, or that they would cut."""
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
    """Sides whose losses are further than `tolerance` from those of the first side."""
    first, *others = comparison.sides
    return [
        f"{other}, {epochs} epochs: losses differ by more than {tolerance} from those of {first}"
        for other in others
        for epochs in comparison.epochs
        for a, b in zip(comparison.outcomes(first, epochs), comparison.outcomes(other, epochs), strict=True)
        if not _distance(a, b) <= tolerance
    ]
