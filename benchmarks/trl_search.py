"""Search TRL's options for the fastest that a user can configure, with short runs on a part of the work.

Each probe is a run of its own: a step to warm up and `--probe-steps` more, and the reference pass of these pairs where
it is precomputed. From them follows what a whole run of so many epochs would cost, so a precomputed reference pays for
its pass, and gains with every epoch. No option here changes what is learned, or in which order.

The search goes from option to option, and keeps the fastest value of each. It goes around twice, since one option may
pay only after another has changed, as more pairs at a time do once checkpointing saves the memory for them.
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
BASE: Options = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
SIZES = (1, 2, 4, 8)  # pairs per device; all pairs of a step are tried as well
AROUND = 2  # times around the options
FLASH: Options = {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
LIGER: Options = {"use_liger_kernel": True}
CHANGES: tuple[Options, ...] = (
    {"precompute_ref_log_probs": False},
    {"gradient_checkpointing": True},
    {"model_init_kwargs": {"attn_implementation": "eager"}},
    {"dataloader_num_workers": 1},
    {"torch_compile": True},
)


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


class Search:
    """The configurations tried so far; a second search, for another number of epochs, uses them again."""

    def __init__(self, run: Callable[[Options, float | None], Outcome], work: Work, changes: Sequence[Options]) -> None:
        """Search with `run`, which trains with these options for at most so many seconds, or raises RunFailed."""
        self._run, self.work, self._changes = run, work, changes
        self.probes: dict[str, Probe] = {}

    def fastest(self, epochs: int) -> Options | None:
        """Return the options whose whole run of so many epochs would be the shortest; None if none of them works."""
        batch = self.work.batch_size
        sizes = [{PAIRS: size} for size in sorted({*SIZES, batch}) if batch % size == 0]
        best: Options = {**BASE, **sizes[0]}
        for _ in range(AROUND):
            for alternatives in (sizes, *([change] for change in self._changes)):
                candidates = [best, *({**best, **change} for change in alternatives)]
                best = min(candidates, key=lambda options: self._try(options, epochs))
        return best if self.seconds(best, epochs) < math.inf else None

    def seconds(self, options: Options, epochs: int) -> float:
        """Return the estimate of the whole run; infinite for what failed or was not tried."""
        probe = self.probes.get(_key(options))
        return math.inf if probe is None or probe.outcome is None else self.work.whole_run(probe.outcome, epochs)

    def _try(self, options: Options, epochs: int) -> float:
        if _key(options) not in self.probes:
            print(f"TRL, {describe(options)}", end=": ", file=sys.stderr, flush=True)
            self.probes[_key(options)] = probe = self._probe(options, self._limit(epochs))
            print(probe.failure or f"{self.seconds(options, epochs):.1f} s for a whole run", file=sys.stderr)
        return self.seconds(options, epochs)

    def _probe(self, options: Options, limit: float | None) -> Probe:
        began = time.perf_counter()
        try:
            outcome, failure = self._run(options, limit), ""
        except RunFailed as error:
            outcome, failure = None, error.reason
        return Probe(options, time.perf_counter() - began, outcome, failure)

    def _limit(self, epochs: int) -> float | None:
        """Seconds after which a probe is far behind: it has lasted as long as a whole run of the fastest would.

        Runs that are shorter than their imports get twice the time of the fastest probe.
        """
        found = [probe for probe in self.probes.values() if probe.outcome]
        best = min(found, key=lambda probe: self.seconds(probe.options, epochs), default=None)
        return None if best is None else max(2 * best.wall_seconds, self.seconds(best.options, epochs))


def changes_here(liger: bool) -> list[Options]:
    """Return what is tried besides the pairs per device, of what works on this machine."""
    flash = liger and importlib.util.find_spec("flash_attn") is not None
    return [*CHANGES, *([FLASH] if flash else []), *([LIGER] if liger else [])]


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
    rows = []
    for probe in sorted(search.probes.values(), key=lambda probe: search.seconds(probe.options, epochs[-1])):
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


def _key(options: Options) -> str:
    return json.dumps(options, sort_keys=True)
