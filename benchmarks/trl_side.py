"""One run of TRL's DPOTrainer: `python trl_side.py JOB_FILE OUTCOME_FILE`."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from common import BETA, MAX_GRAD_NORM, WARMUP_RATIO, Job, Outcome, PeakMemory, describe_machine, describe_tokens


class TimedTrainer(DPOTrainer):
    """DPOTrainer as it is, with a stopwatch on the reference pass that its constructor runs."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        seconds, dataset = _timed(lambda: super(TimedTrainer, self)._precompute_ref_logps(*args))
        self.reference_seconds += seconds
        return dataset


class StepClock(TrainerCallback):
    """Seconds from one step's log to the next one's; the log reads the loss, so the device is done by then."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            self.step_seconds.append(now - self._last)
            self._last = now


def settings(job: Job) -> DPOConfig:
    """TRL's defaults, but for what both sides share; `job.options` are more of TRL's settings."""
    options = {"per_device_train_batch_size": job.batch_size, **job.options}
    return DPOConfig(
        output_dir=job.scratch,
        gradient_accumulation_steps=job.batch_size // options["per_device_train_batch_size"],
        num_train_epochs=job.epochs,
        bf16=job.precision == "bf16",
        optim="rmsprop",
        learning_rate=job.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_RATIO,
        max_grad_norm=MAX_GRAD_NORM,
        beta=BETA,
        max_length=job.max_length,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def train_with_trl(job: Job) -> Outcome:
    """Build the trainer, run it and collect what it measured."""
    memory, start = PeakMemory(), time.perf_counter()
    args = settings(job)
    args.model_init_kwargs = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
    dataset = load_dataset("json", data_files=job.pairs, split="train", cache_dir=job.scratch)
    clock = StepClock()
    trainer = TimedTrainer(
        job.model,
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[clock],
    )
    train_seconds, _ = _timed(trainer.train)
    total_seconds, peak_mib = time.perf_counter() - start, memory.peak_mib()
    return Outcome(
        seconds=trainer.reference_seconds + train_seconds,
        reference_seconds=trainer.reference_seconds,
        total_seconds=total_seconds,
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        step_seconds=clock.step_seconds,
        baseline_mib=memory.baseline_mib,
        peak_mib=peak_mib,
        machine=describe_machine(),
        tokens=[
            describe_tokens(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset
        ],
    )


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


if __name__ == "__main__":
    train_with_trl(Job.read(sys.argv[1])).write(sys.argv[2])
