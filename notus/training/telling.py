"""Opens what a run tells things to, where it begins or goes on: its own files, the terminal, dashboards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from notus.runtime.files import write_text
from notus.training.checkpoint import Progress
from notus.training.describe import DATA_FILE, ENVIRONMENT_FILE, EnvironmentFile
from notus.training.loggers import TensorBoardSink, WandbSink
from notus.training.tracking import (
    METRICS_FILE,
    SAMPLES_FILE,
    MetricsFile,
    ProgressBar,
    SamplesFile,
    Sink,
    Tracker,
)

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
