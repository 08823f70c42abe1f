"""The tracker hands metrics and samples to every logger that the config asks for; `loggers.py` has the loggers."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from notus.config import Config, to_yaml
from notus.runtime.files import write_text
from notus.runtime.process import first_line, tell
from notus.training.checkpoint import Progress
from notus.training.inputs import DATA_FILE
from notus.training.loggers import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    EnvironmentFile,
    Logger,
    MetricsFile,
    ProgressBar,
    SamplesFile,
    TensorBoardLogger,
    WandbLogger,
)
from notus.training.sampling import Sample


class Tracker:
    """Hands what a run reports to every logger. Rank 0 has the loggers; the others have none."""

    def __init__(self, loggers: list[Logger]) -> None:
        self._loggers = loggers
        self._failed: list[Logger] = []
        self._state = {name: value for logger in loggers for name, value in logger.state().items()}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (optimizer steps completed)."""
        self._each(lambda logger: logger.log(step, metrics))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record what the model generates after `step` steps."""
        if samples:
            self._each(lambda logger: logger.log_samples(step, samples))

    def state(self) -> dict[str, str]:
        """Return what a checkpoint keeps, so that a resumed run continues in the same place: the W&B run's id."""
        return dict(self._state)

    def sync(self, step: int) -> None:
        """Wait until everything that was logged up to `step` is on disk."""
        self._each(lambda logger: logger.sync(step))

    def _each(self, work: Callable[[Logger], None]) -> None:
        """A failure ends the run, or, if the logger has a `remedy`, only switches that logger off."""
        for logger in list(self._loggers):
            try:
                work(logger)
            except Exception as error:
                if logger.remedy is None:
                    raise
                self._loggers.remove(logger)
                self._failed.append(logger)
                name = type(logger).__name__.removesuffix("Logger")
                tell(f"warning: {name} fails ({first_line(error)}) and is off for the rest; {logger.remedy}")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self._failed:  # they still hold processes and files; that they failed was reported
            with contextlib.suppress(Exception):
                logger.close()
        self._each(lambda logger: logger.close())


def open_tracker(
    folder: Path, config: Config, progress: Progress, *, total_steps: int, hardware: str, data: Mapping[str, Any]
) -> Tracker:
    """Open every logger that the config asks for, continuing after `progress`; writes `data.json`. For rank 0.

    Args:
        folder: the run's.
        config: the run's settings.
        progress: what the run resumes from.
        total_steps: of the whole run.
        hardware: the job's devices.
        data: the content of `data.json`.

    Raises:
        ValueError: a file is damaged, or a service rejects the run.
        OSError: a file cannot be written.
    """
    tracking, step = config.tracking, progress.step
    recorded = step if progress.recorded else step - 1
    kept = recorded if step else -1  # at step 0 the model is sampled, once
    loggers: list[Logger] = [
        MetricsFile(folder / METRICS_FILE, resume_step=kept, last_logged=progress.logged),
        ProgressBar(total_steps=total_steps, start_step=step),
        EnvironmentFile(folder / ENVIRONMENT_FILE, step=step, hardware=hardware),
    ]
    if tracking.samples or (folder / SAMPLES_FILE).exists():
        loggers.append(SamplesFile(folder / SAMPLES_FILE, resume_step=kept))
    write_text(folder / DATA_FILE, json.dumps(data) + "\n")
    if tracking.wandb:
        loggers.append(
            WandbLogger(
                project=tracking.project,
                name=tracking.run_name or folder.name,
                folder=folder,
                config={**dataclasses.asdict(config), "data_summary": data},
                run_id=progress.trackers.get("wandb"),
            )
        )
    if tracking.tensorboard:
        texts = {"config": to_yaml(config), "data": json.dumps(data, indent=1)}
        loggers.append(TensorBoardLogger(folder, resume_step=kept, texts=texts))
    return Tracker(loggers)
