"""Search TRL's options for the fastest that a user can configure, with short runs on a part of the work.

Each probe is a run of its own: a step to warm up and `--probe-steps` more, and the reference pass of these pairs where
it is precomputed. From them follows what a whole run of so many epochs would cost, so a precomputed reference pays for
its pass, and gains with every epoch. No option here changes what is learned, or in which order.
"""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common import Outcome

Options = dict[str, Any]
PAIRS = "per_device_train_batch_size"
REFERENCE_PAIRS = "precompute_ref_batch_size"
BASE: Options = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
SIZES = (1, 2, 4, 8)  # pairs per device; all pairs of a step are tried as well
NEAR = 1.25  # sizes within this factor of the fastest are tried with the other options too
EXTRAS: tuple[Options, ...] = (
    {"model_init_kwargs": {"attn_implementation": "eager"}},
    {"dataloader_num_workers": 1},
    {"torch_compile": True},
)
FLASH: Options = {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
LIGER: Options = {"use_liger_kernel": True}


class RunFailed(SystemExit):
    """A run ended with an error, which is the message; as it stands, it ends the benchmark."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class TimedOut(RunFailed):
    """A run was stopped because it took too long."""


@dataclass(frozen=True)
class Work:
    """The whole work, and the part of it that a probe does."""

    num_pairs: int
    batch_size: int
    probe_steps: int = 1

    @property
    def probe_pairs(self) -> int:
        """Return how many pairs a probe has: enough for its steps, if there are so many."""
        return min(self.num_pairs, (1 + self.probe_steps) * self.batch_size)

    @property
    def probe_epochs(self) -> int:
        """Return how often a probe goes over its pairs: once, unless they are too few for its steps."""
        return math.ceil((1 + self.probe_steps) * self.batch_size / self.probe_pairs)

    def whole_run(self, outcome: Outcome, epochs: int) -> float:
        """Return the seconds that a run over all pairs would take, reference pass and training, judged by a probe."""
        first, *later = outcome.step_seconds
        steps = self.num_pairs // self.batch_size * epochs
        reference = outcome.reference_seconds * self.num_pairs / self.probe_pairs
        around = outcome.seconds - outcome.reference_seconds - sum(outcome.step_seconds)
        return reference + first + (steps - 1) * sum(later) / len(later) + around


@dataclass(frozen=True)
class Probe:
    """What one configuration did: an outcome, or why there is none. `wall_seconds` has its imports too."""

    options: Options
    wall_seconds: float
    outcome: Outcome | None = None
    failure: str = ""
    timed_out: bool = False


class Search:
    """The configurations tried so far; a second search, for another number of epochs, uses them again."""

    def __init__(self, run: Callable[[Options, float | None], Outcome], work: Work, extras: Sequence[Options]) -> None:
        """Search with `run`, which trains with these options for at most so many seconds, or raises RunFailed."""
        self._run, self.work, self._extras = run, work, extras
        self.probes: dict[str, Probe] = {}

    def fastest(self, epochs: int) -> Options | None:
        """Return the options whose whole run of so many epochs would be the shortest; None if none of them works."""
        for size in self._sizes():
            self._try({**BASE, PAIRS: size}, epochs)
        for size in self._near(epochs):
            self._try_around({**BASE, PAIRS: size}, epochs)
        for extra in (*self._reference_sizes(epochs), *self._extras):
            if best := self._best(epochs):
                self._try({**best.options, **extra}, epochs)
        best = self._best(epochs)
        return best.options if best else None

    def seconds(self, options: Options, epochs: int) -> float:
        """Return the estimate of the whole run; infinite for what failed or was not tried."""
        probe = self.probes.get(_key(options))
        return math.inf if probe is None or probe.outcome is None else self.work.whole_run(probe.outcome, epochs)

    def _sizes(self) -> list[int]:
        batch = self.work.batch_size
        return sorted({size for size in (*SIZES, batch) if batch % size == 0})

    def _near(self, epochs: int) -> list[int]:
        """Sizes that may yet win: not far behind, or failed, as for want of memory that checkpointing would save."""
        found = {size: {**BASE, PAIRS: size} for size in self._sizes()}
        best = min(self.seconds(options, epochs) for options in found.values())
        return [
            size
            for size, options in found.items()
            if self.seconds(options, epochs) <= NEAR * best or _failed(self.probes[_key(options)])
        ]

    def _try_around(self, base: Options, epochs: int) -> None:
        """Try a live reference and checkpointing, and both where each of them helped."""
        changes: tuple[Options, ...] = ({"precompute_ref_log_probs": False}, {"gradient_checkpointing": True})
        for change in changes:
            self._try({**base, **change}, epochs)
        if all(self.seconds({**base, **change}, epochs) < self.seconds(base, epochs) for change in changes):
            self._try({**base, **changes[0], **changes[1]}, epochs)

    def _reference_sizes(self, epochs: int) -> list[Options]:
        """The size whose reference pass was the fastest, where the fastest configuration has another."""
        best = self._best(epochs)
        if best is None or not best.options["precompute_ref_log_probs"]:
            return []
        passes = {
            probe.options[PAIRS]: probe.outcome.reference_seconds
            for probe in self.probes.values()
            if probe.outcome and probe.options["precompute_ref_log_probs"] and REFERENCE_PAIRS not in probe.options
        }
        own = best.options[PAIRS]
        size = min(passes, key=lambda size: (passes[size], size != own))
        return [] if size == own else [{REFERENCE_PAIRS: size}]

    def _best(self, epochs: int) -> Probe | None:
        found = [probe for probe in self.probes.values() if probe.outcome]
        return min(found, key=lambda probe: self.seconds(probe.options, epochs), default=None)

    def _try(self, options: Options, epochs: int) -> None:
        if _key(options) in self.probes:
            return
        print(f"TRL, {describe(options)}", end=": ", file=sys.stderr, flush=True)
        limit, began = self._limit(epochs), time.perf_counter()
        try:
            outcome, failure, timed_out = self._run(options, limit), "", False
        except RunFailed as error:
            outcome, failure, timed_out = None, error.reason, isinstance(error, TimedOut)
        self.probes[_key(options)] = Probe(options, time.perf_counter() - began, outcome, failure, timed_out)
        print(failure or f"{self.seconds(options, epochs):.1f} s for a whole run", file=sys.stderr)

    def _limit(self, epochs: int) -> float | None:
        """Seconds after which a probe is far behind: it has lasted as long as a whole run of the fastest would.

        Runs that are shorter than their imports get twice the time of the fastest probe.
        """
        best = self._best(epochs)
        return None if best is None else max(2 * best.wall_seconds, self.seconds(best.options, epochs))


def extras_here(liger: bool) -> list[Options]:
    """Return the options to try on top of the fastest, of those that work on this machine."""
    flash = liger and importlib.util.find_spec("flash_attn") is not None
    return [*EXTRAS, *([FLASH] if flash else []), *([LIGER] if liger else [])]


def describe(options: Options) -> str:
    """Return the options in words."""
    rest = {name: value for name, value in options.items() if name not in (*BASE, PAIRS, "model_init_kwargs")}
    pairs = options.get(PAIRS)
    words = [
        f"{pairs} pair{'s' if pairs != 1 else ''} per device" if pairs else "all pairs at once",
        "reference precomputed" if options.get("precompute_ref_log_probs") else "reference live",
        "checkpointing" if options.get("gradient_checkpointing", True) else "no checkpointing",
        *(f"{name} {value}" for name, value in {**rest, **options.get("model_init_kwargs", {})}.items()),
    ]
    return ", ".join(words)


def tried(search: Search, epochs: Sequence[int]) -> list[Options]:
    """Return a row per configuration, the fastest for the last of `epochs` first: estimates, or why it has none."""
    probes = sorted(search.probes.values(), key=lambda probe: search.seconds(probe.options, epochs[-1]))
    rows = []
    for probe in probes:
        row = {"options": probe.options, "wall_seconds": probe.wall_seconds, "failure": probe.failure}
        if probe.outcome:
            row["whole_run_seconds"] = {number: search.seconds(probe.options, number) for number in epochs}
            row |= {name: getattr(probe.outcome, name) for name in ("reference_seconds", "step_seconds", "peak_mib")}
        rows.append(row)
    return rows


def table(rows: Sequence[Options], epochs: Sequence[int]) -> str:
    """Return what was tried, a line per configuration."""
    heads = ", ".join(f"{number} ep." for number in epochs)
    lines = [f"TRL's options as tried on a part of the work; seconds of a whole run ({heads}) as they would be:"]
    for row in rows:
        seconds = row.get("whole_run_seconds", {}).values()
        figures = ", ".join(f"{value:.1f}" for value in seconds) or row["failure"]
        lines.append(f"  {describe(row['options'])}: {figures}")
    return "\n".join(lines)


def _failed(probe: Probe) -> bool:
    return probe.outcome is None and not probe.timed_out


def _key(options: Options) -> str:
    return json.dumps(options, sort_keys=True)
