"""One run of `real_model.py` in a process of its own, with stopwatches and the most memory that it had.

    python real_model_side.py notus JOB_FILE OUTCOME_FILE
    python real_model_side.py trl JOB_FILE OUTCOME_FILE     # in an environment that has TRL; it needs no Notus

A job of Notus is `{"config": FILE, "overrides": [...]}`; one of TRL is a `common.Job`, with `optim`
and perhaps `last_step` among its options.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from common import Job, PeakMemory, describe_machine, write_json


def run_notus(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `notus dpo` does; the training is the sum of the steps, without evaluation, checkpoints and export."""
    from notus.config import load_config
    from notus.training.dpo import build_task
    from notus.training.setup import start

    config = load_config([job["config"], *job["overrides"]], "dpo")
    memory, began, worked = PeakMemory(), time.perf_counter(), time.process_time()
    with start(config) as run:
        assert run is not None, f"{config.training.output_dir} holds a finished run: name a new folder"
        loaded = time.perf_counter()
        task = build_task(run, config)
        reference_seconds = time.perf_counter() - loaded
        run.train(task)
    total_seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    lines = [json.loads(line) for line in Path(config.training.output_dir, "metrics.jsonl").read_text().splitlines()]
    step_seconds = [config.training.batch_size / line["pairs_per_second"] for line in lines]
    return {
        "reference_seconds": reference_seconds,
        "training_seconds": sum(step_seconds),
        "total_seconds": total_seconds,
        "cpu_seconds": cpu_seconds,
        "step_seconds": step_seconds,
        "losses": [line["loss"] for line in lines],
        "peak_mib": memory.peak_mib(),
    }


def run_trl(job: Job) -> dict[str, Any]:
    """Train with TRL's DPOTrainer and save the model to `scratch/model`."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback

    from common import describe_tokens
    from trl_side import StepClock, TimedTrainer, settings

    options = dict(job.options)
    optimizer, last_step = options.pop("optim"), options.pop("last_step", None)

    class Stop(TrainerCallback):
        """Ends the training after `last_step`. The schedule is that of the whole run."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == last_step:
                control.should_training_stop = True

    memory, began, worked = PeakMemory(), time.perf_counter(), time.process_time()
    args = settings(dataclasses.replace(job, options=options))
    args.optim = optimizer
    args.model_init_kwargs = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
    clock = StepClock()
    trainer = TimedTrainer(
        job.model,
        args=args,
        train_dataset=load_dataset("json", data_files=job.pairs, split="train", cache_dir=job.scratch),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[clock, Stop()],
    )
    trainer.train()
    trainer.save_model(f"{job.scratch}/model")
    return {
        "reference_seconds": trainer.reference_seconds,
        "training_seconds": sum(clock.step_seconds),
        "total_seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - worked,
        "step_seconds": clock.step_seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_mib": memory.peak_mib(),
        "tokens": [
            describe_tokens(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset
        ],
    }


if __name__ == "__main__":
    side, source, outcome = sys.argv[1:]
    found = run_notus(json.loads(Path(source).read_text())) if side == "notus" else run_trl(Job.read(source))
    write_json(Path(outcome), {**found, "load_average": os.getloadavg(), "machine": describe_machine()})
