"""One run of Notus: `python notus_side.py JOB_FILE OUTCOME_FILE`."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common import BETA, MAX_GRAD_NORM, WARMUP_RATIO, Job, Outcome, PeakMemory, describe_machine, describe_tokens
from notus.config import config_from_dict
from notus.data.dataset import TokenizedDataset
from notus.training import setup as training
from notus.training.dpo import build_task
from notus.training.setup import start
from notus.training.trainer import Ending, Trainer


class TimedTrainer(Trainer):
    """The trainer as it is, with a stopwatch, as TRL's has one. It saves no checkpoints, as TRL's saves none."""

    marks: tuple[float, ...] = ()  # when it began, when each step was logged, and when it was done

    def run(self) -> Ending:
        """Train as ever, through a tracker that notes the time and a checkpoint writer that does not write."""
        log, checkpoints = self.tracker.log, self.checkpoints

        def timed_log(step: int, metrics: Mapping[str, float]) -> None:
            log(step, metrics)
            TimedTrainer.marks += (time.perf_counter(),)

        self.tracker.log = timed_log  # type: ignore[method-assign]
        checkpoints.save = lambda *_: None  # type: ignore[method-assign]
        TimedTrainer.marks = (time.perf_counter(),)
        ending = super().run()
        TimedTrainer.marks += (time.perf_counter(),)
        return ending


def run_notus(job: Job) -> Outcome:
    """Run a job; the seconds are those of the reference pass and of the trainer from its first line to its last."""
    training.Trainer = TimedTrainer  # type: ignore[misc]
    memory, began = PeakMemory(), time.perf_counter()
    config = config_from_dict(_settings(job), "dpo")
    with start(config) as run:
        assert run is not None
        before = time.perf_counter()
        task = build_task(run, config)
        reference_seconds = time.perf_counter() - before
        run.train(task)
        tokens = _tokens(run.train_rows)
    marks = TimedTrainer.marks
    lines = [json.loads(line) for line in (Path(job.scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
    return Outcome(
        seconds=reference_seconds + marks[-1] - marks[0],
        reference_seconds=reference_seconds,
        total_seconds=marks[-1] - began,
        losses=[line["loss"] for line in lines],
        step_seconds=np.diff(marks[:-1]).tolist(),
        baseline_mib=memory.baseline_mib,
        peak_mib=memory.peak_mib(),
        machine=describe_machine(),
        tokens=tokens,
    )


def _settings(job: Job) -> dict[str, dict[str, Any]]:
    return {
        "model": {"name_or_path": job.model},
        "data": {
            "train": job.pairs,
            "max_length": job.max_length,
            "shuffle": False,
            "cache_dir": f"{job.scratch}/cache",
        },
        "training": {
            "output_dir": f"{job.scratch}/run",
            "batch_size": job.batch_size,
            "epochs": job.epochs,
            "learning_rate": job.learning_rate,
            "warmup_ratio": WARMUP_RATIO,
            "max_grad_norm": MAX_GRAD_NORM,
            "precision": job.precision,
            "activation_checkpointing": "none",
            **job.options,
        },
        "dpo": {"beta": BETA},
        "tracking": {"samples": 0},
    }


def _tokens(rows: TokenizedDataset) -> list[list[Any]]:
    described = []
    for example in rows(np.arange(len(rows))):
        chosen, rejected = (branch.tolist() for branch in example.branches)
        described.append(describe_tokens(example.trunk.tolist(), chosen, rejected))
    return described


if __name__ == "__main__":
    run_notus(Job.read(sys.argv[1])).write(sys.argv[2])
