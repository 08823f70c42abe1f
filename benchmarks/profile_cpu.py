"""Where the time of a DPO step goes on this CPU, by kind of work.

    python benchmarks/profile_cpu.py [--size 15m|100m] [--precision fp32|bf16]

Made model and pairs, as in vs_trl.py: two steps to warm up, then two under torch's profiler.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, installed or not

from notus.config import config_from_dict
from notus.runtime.process import leave
from notus.training.dataloader import Dataloader, row_costs
from notus.training.dpo import DPOTask, Preferences
from notus.training.optimizers import build_optimizer, clipped_update, gradient_norm, local_gradients
from notus.training.parallelize import expect_last_row, hand_over_gradients
from notus.training.setup import Run, start
from profile_step import profiled, table
from synthetic_pairs import make_pairs
from synthetic_setup import SIZES, make_model

WARM_UP, STEPS, PAIRS_PER_STEP = 2, 2, 16


class Step:
    """What `notus.training.trainer` does in a step, without its books. The reference's log-probs are given as zeros."""

    def __init__(self, run: Run, feed: Dataloader) -> None:
        training, rows = run.config.training, run.train_rows
        self._task = DPOTask(
            Preferences(rows, torch.zeros(len(rows), 2)),
            None,
            plan=run.plan,
            config=run.config.dpo,
            precision=training.precision,
            tokens_per_row=training.tokens_per_row,
            device=run.device,
        )
        self._run, self._feed, self._number = run, feed, itertools.count()
        self._optimizer = build_optimizer(run.policy.parameters(), name="rmsprop", learning_rate=5e-7, weight_decay=0.0)

    def __call__(self) -> None:
        policy, indices = self._run.policy, self._run.plan.indices(next(self._number))
        for batch, last in self._feed.step():
            expect_last_row(policy, last)
            batch = self._task.prepare(batch)
            self._task.row_loss(policy(batch), batch, indices).loss.backward()
        hand_over_gradients(policy)
        gradients = local_gradients(policy.parameters())
        with torch.profiler.record_function("clip"):
            norm = gradient_norm(gradients, torch.zeros(1))[0]
        clipped_update(self._optimizer, gradients, norm, 1.0)
        self._optimizer.zero_grad(set_to_none=True)


def measure(folder: Path, size: str, precision: str) -> dict[str, float]:
    """Shares of a step's time."""
    make_model(folder / "model", seed=0, size=size)
    make_pairs(folder / "pairs.jsonl", (WARM_UP + STEPS) * PAIRS_PER_STEP, seed=0)
    config = config_from_dict(
        {
            "model": {"name_or_path": str(folder / "model")},
            "data": {"train": str(folder / "pairs.jsonl"), "shuffle": False, "cache_dir": str(folder / "cache")},
            "training": {
                "output_dir": str(folder / "run"), "batch_size": PAIRS_PER_STEP, "tokens_per_row": 1280,
                "precision": precision, "activation_checkpointing": "none",
            },
        },
        "dpo",
    )  # fmt: skip
    with start(config, "dpo") as run:
        assert run is not None
        options = {"tokens_per_row": config.training.tokens_per_row, "device": run.device}
        costs = row_costs(run.policy, run.train_rows)
        with Dataloader(run.train_rows, costs, run.plan, range(WARM_UP + STEPS), **options) as feed:
            step = Step(run, feed)
            for _ in range(WARM_UP):
                step()
            found = profiled(step, STEPS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a DPO step goes: see the head of this file.")
    parser.add_argument("--size", choices=list(SIZES), default="15m")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(table(measure(Path(scratch), args.size, args.precision)))
    leave(0)


if __name__ == "__main__":
    main()
