"""One run of Notus: `python notus_side.py JOB_FILE OUTCOME_FILE`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from job import BETA, MAX_GRAD_NORM, WARMUP_RATIO, Job, Outcome, describe_tokens
from memory import PeakMemory, describe_machine
from notus.config import config_from_dict
from notus.data.rows import Rows
from notus.training.dpo import build_task
from notus.training.run import start


def run_notus(job: Job) -> Outcome:
    """Run a job; the seconds are those of the reference pass and of the optimizer steps, as they are logged."""
    memory, began = PeakMemory(), time.perf_counter()
    config = config_from_dict(_settings(job), "dpo")
    with start(config, "dpo") as run:
        assert run is not None
        before = time.perf_counter()
        task = build_task(run, config)
        reference_seconds = time.perf_counter() - before
        run.train(task)
        tokens = _tokens(run.train_rows)
        pairs = [len(run.plan.indices(step)) for step in range(run.total_steps)]
    lines = [json.loads(line) for line in (Path(job.scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
    step_seconds = [count / line["pairs_per_second"] for count, line in zip(pairs, lines, strict=True)]
    return Outcome(
        seconds=reference_seconds + sum(step_seconds),
        reference_seconds=reference_seconds,
        total_seconds=time.perf_counter() - began,
        losses=[line["loss"] for line in lines],
        step_seconds=step_seconds,
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
            "save_every": 10**6,  # the peer saves nothing either; the last checkpoint is not in the seconds
            "activation_checkpointing": "none",
            **job.options,
        },
        "dpo": {"beta": BETA},
    }


def _tokens(rows: Rows) -> list[list[Any]]:
    described = []
    for example in rows(np.arange(len(rows))):
        chosen, rejected = (branch.tolist() for branch in example.branches)
        described.append(describe_tokens(example.trunk.tolist(), chosen, rejected))
    return described


if __name__ == "__main__":
    run_notus(Job.read(sys.argv[1])).write(sys.argv[2])
