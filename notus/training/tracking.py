"""What a run tells while it trains: progress on the terminal, `metrics.jsonl`, `samples.jsonl`, and other sinks.

`metrics.jsonl` is the run's own record: where it cannot be written, the run ends. Everything else is a courtesy: where
it fails, it is switched off with a warning, and training goes on.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from notus.runtime.files import write_text
from notus.runtime.process import first_line, tell
from notus.training.checkpoint import Progress
from notus.training.describe import DATA_FILE, ENVIRONMENT_FILE, EnvironmentFile
from notus.training.loggers import StepLines, TensorBoardSink, WandbSink
from notus.training.sampling import Sample

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


class Sink:
    """Where what a run tells goes; a sink takes what it has a use for.

    Attributes:
        remedy: what the user is told where it fails and is switched off; None: its failure ends the run.
    """

    remedy: str | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a line of metrics."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Take what the model says after `step` steps."""

    def sync(self, step: int) -> None:
        """Put everything on disk, before the checkpoint of `step`."""

    def state(self) -> dict[str, str]:
        """What a resumed run needs to go on in the same place."""
        return {}

    def close(self) -> None:
        """Finish."""


class MetricsFile(Sink):
    """One JSON object per line of metrics."""

    def __init__(self, path: Path, *, resume_step: int, last_logged: int = 0) -> None:
        """See `StepLines`."""
        self._lines = StepLines(path, resume_step=resume_step, last_logged=last_logged)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.append([{"step": step, **metrics}])

    def sync(self, step: int) -> None:
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


class SamplesFile(Sink):
    """One JSON object per sample."""

    remedy = "samples are not kept from here on"

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """See `StepLines`."""
        self._lines = StepLines(path, resume_step=resume_step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._lines.append({"step": step, **dataclasses.asdict(sample)} for sample in samples)

    def sync(self, step: int) -> None:
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


class ProgressBar(Sink):
    """A bar where there is a terminal, a line every few seconds where there is none."""

    remedy = f"{METRICS_FILE} has every line"

    def __init__(
        self, *, total_steps: int, start_step: int, shown: Mapping[str, str], seconds_between: float = 5.0
    ) -> None:
        """`shown` maps a label to the metric that stands behind it."""
        self._shown = shown
        self._total, self._start, self._began = total_steps, start_step, time.monotonic()
        self._between, self._last = seconds_between, float("-inf")
        interactive = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True) if interactive else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = {label: f"{metrics[key]:.4g}" for label, key in self._shown.items() if key in metrics}
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        evaluated = any(key.startswith("eval_") for key in metrics)
        if now - self._last < self._between and step != self._total and not evaluated:
            return
        self._last = now
        left = (now - self._began) / max(1, step - self._start) * (self._total - step)
        figures.update({key: f"{value:.4g}" for key, value in metrics.items() if key.startswith("eval_")})
        told = "  ".join(f"{label} {value}" for label, value in figures.items())
        tell(f"step {step}/{self._total}  {told}  left {_clock(left)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


class Tracker:
    """Hands what a run tells to every sink. Rank 0 has the sinks; the others have none."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._off: list[Sink] = []
        self._state = {name: value for sink in sinks for name, value in sink.state().items()}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (optimizer steps completed)."""
        self._each(lambda sink: sink.log(step, metrics))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record what the model says after `step` steps."""
        if samples:
            self._each(lambda sink: sink.log_samples(step, samples))

    def state(self) -> dict[str, str]:
        """What a checkpoint keeps, so that a resumed run goes on in the same place: the W&B run's id."""
        return dict(self._state)

    def sync(self, step: int) -> None:
        """Wait until what was told up to `step` is on disk."""
        self._each(lambda sink: sink.sync(step))

    def _each(self, work: Callable[[Sink], None]) -> None:
        """A failure is the run's end, or with a `remedy` the sink's: training matters more than its trackers."""
        for sink in list(self._sinks):
            try:
                work(sink)
            except Exception as error:
                if sink.remedy is None:
                    raise
                self._sinks.remove(sink)
                self._off.append(sink)
                name = type(sink).__name__.removesuffix("Sink")
                tell(f"warning: {name} fails ({first_line(error)}) and is off for the rest; {sink.remedy}")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._off:  # their processes and files; that they fail was told
            with contextlib.suppress(Exception):
                sink.close()
        self._each(lambda sink: sink.close())


# DOC notus/training/tracking.py: """Opens what a run tells things to, where it begins or goes on: its own files, the terminal, dashboards."""


SHOWN = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "pairs/s": "pairs_per_second",
    "examples/s": "examples_per_second",
}


def open_tracker(
    folder: Path,
    progress: Progress,
    *,
    total_steps: int,
    hardware: str,
    settings: Mapping[str, Any],
    config_text: str,
    data: Mapping[str, Any],
) -> Tracker:
    """Open all that the config asks for, going on after `progress`; writes `data.json`. For rank 0.

    Args:
        folder: the run's.
        progress: what the run goes on from.
        total_steps: of the whole run.
        hardware: the job's devices.
        settings: the resolved config as a tree; `config_text`: as YAML.
        data: the content of `data.json`.

    Raises:
        ValueError: a file or a tracker refuses; OSError: the disk does.
    """
    tracking, step = settings["tracking"], progress.step
    recorded = step if progress.recorded else step - 1
    kept = recorded if step else -1  # at step 0 the model is sampled, once
    sinks: list[Sink] = [
        MetricsFile(folder / METRICS_FILE, resume_step=kept, last_logged=progress.logged),
        ProgressBar(total_steps=total_steps, start_step=step, shown=SHOWN),
        EnvironmentFile(folder / ENVIRONMENT_FILE, step=step, hardware=hardware),
    ]
    if tracking["samples"] or (folder / SAMPLES_FILE).exists():
        sinks.append(SamplesFile(folder / SAMPLES_FILE, resume_step=kept))
    write_text(folder / DATA_FILE, json.dumps(data) + "\n")
    if tracking["wandb"]:
        name, run_id = tracking["run_name"] or folder.name, progress.trackers.get("wandb")
        told = {**settings, "data_summary": data}
        sinks.append(WandbSink(project=tracking["project"], name=name, folder=folder, config=told, run_id=run_id))
    if tracking["tensorboard"]:
        texts = {"config": config_text, "data": json.dumps(data, indent=1)}
        sinks.append(TensorBoardSink(folder, resume_step=kept, texts=texts))
    return Tracker(sinks)
