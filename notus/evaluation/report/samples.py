"""Sample generations side by side: before and after one run, or the last ones of several."""

import dataclasses
from collections.abc import Sequence

from notus.evaluation.report.reading import RunRecord, Sample


@dataclasses.dataclass(frozen=True)
class SampleGroup:
    """Prompts with an answer for each of `columns`."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    title: str = ""


def sample_groups(runs: Sequence[RunRecord]) -> list[SampleGroup]:
    """Where several runs answered the same prompts: their last answers; else each run's, before and after."""
    written = [run for run in runs if run.samples]
    last = [{found[-1].prompt: found[-1] for found in run.samples} for run in written]
    shared = [prompt for prompt in last[0] if all(prompt in of_run for of_run in last)] if last else []
    if len(written) > 1 and shared:
        steps = [max(sample.step for sample in of_run.values()) for of_run in last]
        columns = [f"{run.label}, step {step:,}" for run, step in zip(written, steps, strict=True)]
        return [SampleGroup(columns, [(prompt, [of_run[prompt].completion for of_run in last]) for prompt in shared])]
    return [_before_and_after(run, run.label if len(runs) > 1 else "") for run in written]


def _before_and_after(run: RunRecord, title: str) -> SampleGroup:
    steps = [found[0].step for found in run.samples] + [found[-1].step for found in run.samples]
    first, last = min(steps), max(steps)
    columns = [_heading(first)] if first == last else [_heading(first), _heading(last)]
    rows = [(found[0].prompt, [sample.completion for sample in _ends(found)]) for found in run.samples]
    whole = [row for row in rows if len(row[1]) == len(columns)]  # a prompt of a step still being written waits
    return SampleGroup(columns, whole, title)


def _ends(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples if len(samples) == 1 else (samples[0], samples[-1])


def _heading(step: int) -> str:
    return "Before training" if step == 0 else f"After step {step:,}"
