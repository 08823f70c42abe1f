"""The one training loop. It knows steps, rows and gradients; pairs and losses are its task's business."""

import dataclasses
import enum
import math
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from notus.data.dataset import Rows
from notus.data.packing import Batch
from notus.data.schedule import StepPlan
from notus.model.policy import Policy
from notus.runtime.distributed import gather_objects, rank, say, sum_across_ranks, world_size
from notus.runtime.preemption import Interrupted, Stop
from notus.training.checkpoint import Progress
from notus.training.checkpoint_writer import Checkpoints
from notus.training.dataloader import Feed, row_costs
from notus.training.guards import Guard, Guards
from notus.training.metering import Meter
from notus.training.optim import (
    clipped_update,
    gradient_norm,
    is_first_replica,
    learning_rate_factor,
    local_gradients,
    set_learning_rate,
)
from notus.training.optimizers import InPieces
from notus.training.parallelize import expect_last_row, hand_over_gradients
from notus.training.sampling import Sample
from notus.training.tracking import Tracker


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is not finite; the update was not made."""


class Ending(enum.Enum):
    """Why the loop ended."""

    FINISHED = "the last step is done"
    SIGNAL = "a signal"
    BUDGET = "training.max_hours"


@dataclasses.dataclass
class RowLoss:
    """What one packed row adds to a step.

    Attributes:
        loss: scalar with gradient, the row's share of the step's loss: already divided by the step's global count.
        sums: fp64 [number of the task's metrics], detached.
        per_example: [E], detached; names the culprits if the step is not finite.
    """

    loss: Tensor
    sums: Tensor
    per_example: Tensor


class Task(Protocol):
    """What is learned: SFT or DPO."""

    rows: Rows
    plan: StepPlan
    num_sums: int
    guards: tuple[Guard, ...]

    def prepare(self, batch: Batch) -> Batch:
        """Add what `row_loss` needs beside the row; called on the feed's thread, so that the loop need not wait."""
        ...

    def row_loss(self, logps: Tensor, batch: Batch, step_indices: np.ndarray) -> RowLoss:
        """The loss of one row from its log-probs [E, K]; `step_indices`: all ranks' dataset rows of the step."""
        ...

    def metrics(self, sums: list[float], seconds: float) -> dict[str, float]:
        """Flat metrics from sums over steps, rows and ranks, and the wall-clock seconds they took."""
        ...

    def check_first_step(self, sums: list[float]) -> None:
        """Raise ValueError if the metric sums of a fresh run's first step show that something is wrong."""
        ...

    def evaluate(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """Metrics on held-out data; empty if there is none. Collective; calls `on_row`, which may raise, per row."""
        ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train; the names are those of the config's `training` section, steps are optimizer steps.

    `eval_every=None`: only at the end. `save_every=None`: at each epoch's end. A checkpoint is always written at the
    end.
    """

    total_steps: int
    warmup_steps: int
    learning_rate: float
    lr_schedule: str
    max_grad_norm: float | None
    tokens_per_row: int
    seed: int
    log_every: int
    eval_every: int | None
    save_every: int | None


Sampling = Callable[[Callable[[], None]], list[Sample]]


class Trainer:
    """Takes a policy from `progress` to `settings.total_steps`."""

    def __init__(
        self,
        policy: Policy,
        optimizer: InPieces,
        task: Task,
        settings: Settings,
        *,
        progress: Progress,
        tracker: Tracker,
        checkpoints: Checkpoints,
        stop: Stop,
        meter: Meter,
        sample: Sampling | None,
        device: torch.device,
    ) -> None:
        self.policy, self.optimizer, self.task, self.settings = policy, optimizer, task, settings
        self.progress, self.tracker, self.checkpoints, self.device = progress, tracker, checkpoints, device
        self.stop, self.meter, self.sample = stop, meter, sample
        self.trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._sums = torch.zeros(task.num_sums, dtype=torch.float64, device=device)
        self._sums += torch.tensor(_own_share(progress.window_sums, task.num_sums), dtype=torch.float64, device=device)
        self._seconds = progress.window_seconds
        self._trained = 0.0  # seconds of this launch's steps
        self._guards = Guards(task.guards)
        # one rank that holds all of the model where it computes
        self._whole = world_size() == 1 and self.trainable[0].device == device

    def run(self) -> Ending:
        """Train, log, evaluate and save until the last step, or until the run is to stop; then all is on disk."""
        self.policy.train()
        with self.stop.in_loop():
            try:
                with self._feed() as feed:
                    ending = self._run(feed)
            except Exception as error:
                if not isinstance(error, RuntimeError):  # which may mean that the other ranks are gone
                    self.checkpoints.wait()  # what was saved before is worth its last bytes
                raise
            self.checkpoints.wait()
        self._say_idle(feed)
        return ending

    def _say_idle(self, feed: Feed) -> None:
        """Print what share of this launch's steps was spent waiting; collective."""
        waited = max(gather_objects(feed.waited / self._trained if self._trained else 0.0))
        say(f"idle: {waited:.2%} of the steps for want of data, {feed.idle_share:.2%} by cost for a heavier rank")

    def _feed(self) -> Feed:
        task, settings = self.task, self.settings
        return Feed(
            task.rows,
            row_costs(self.policy, task.rows),
            task.plan,
            range(self.progress.step, settings.total_steps),
            tokens_per_row=settings.tokens_per_row,
            device=self.device,
            prepare=task.prepare,
        )

    def _run(self, feed: Feed) -> Ending:
        saved, ending = self.progress.step, self._begin()
        while True:
            if not self.progress.recorded:
                ending = self._record(ending)
            step = self.progress.step
            if saved != step and (ending or self._due(self.settings.save_every or self.task.plan.steps_per_epoch)):
                self._save()
                saved = step
            if step == self.settings.total_steps and self.progress.recorded:
                return Ending.FINISHED
            if ending is not None:
                return ending
            ending = self._step(feed)
            if self.progress.step == 1:
                self.task.check_first_step(self._global_sums())

    def _begin(self) -> Ending | None:
        """Let a fresh model speak; returns the reason to stop, if there is one by now."""
        if self.progress.step == 0:
            try:
                self.tracker.log_samples(0, self._samples())
            except Interrupted:
                return Ending.SIGNAL
        return None

    def _samples(self) -> list[Sample]:
        return self.sample(self.stop.check) if self.sample else []

    def _record(self, ending: Ending | None) -> Ending | None:
        """Log what is due at this step; returns the reason to stop, if there is one by now."""
        evaluate = self._due(self.settings.eval_every)
        if evaluate and ending is not None:
            return ending  # the next launch evaluates
        if evaluate or self._due(self.settings.log_every):
            held_out: dict[str, float] = {}
            samples: list[Sample] = []
            if evaluate:
                try:
                    held_out, samples = self.task.evaluate(self.policy, self.stop.check), self._samples()
                except Interrupted:
                    return Ending.SIGNAL
            metrics = self._window()
            for warning in self._guards.check(metrics):
                say(warning)
            self.tracker.log(self.progress.step, {**metrics, **held_out})
            self.tracker.log_samples(self.progress.step, samples)
            self.progress.logged = self.progress.step
        self.progress.recorded = True
        return ending

    def _due(self, every: int | None) -> bool:
        step = self.progress.step
        return step == self.settings.total_steps or (every is not None and step % every == 0)

    def _step(self, feed: Feed) -> Ending | None:
        """One optimizer step; returns the reason to stop after it, if any rank has one."""
        began = time.perf_counter()
        settings, step = self.settings, self.progress.step
        # Dropout depends on the step and the rank alone, so a resumed run draws what an undisturbed one would.
        torch.manual_seed(np.random.SeedSequence([settings.seed, step, rank()]).generate_state(1, np.uint64).item())
        indices = self.task.plan.indices(step)
        examples: list[tuple[Tensor, Tensor]] = []
        flags = torch.zeros(4, device=self.device)
        bad, *mine = flags.unbind()
        for batch, last in feed.step():
            if self._whole:
                expect_last_row(self.policy, last)
            batch = batch.to(self.device)
            result = self.task.row_loss(self.policy(batch), batch, indices)
            result.loss.backward()
            self._sums += result.sums
            bad += ~torch.isfinite(result.loss.detach())
            examples.append((batch.indices, result.per_example))
        if self._whole:
            hand_over_gradients(self.policy)
        gradients = local_gradients(self.trainable)
        for flag, raised in zip(mine, (self.checkpoints.failed(), self.stop.signalled, self.stop.overdue), strict=True):
            if raised:
                flag.fill_(1.0)  # a copy from the host would wait for the backward pass
        told = gradient_norm(gradients, flags, first_replica=is_first_replica(self.trainable))
        norm, losses_bad, save_failed, signalled, overdue = told.tolist()  # the step's one host sync
        if save_failed:
            self.checkpoints.wait()
        if losses_bad or not math.isfinite(norm):
            self._refuse(examples)
        rate = settings.learning_rate * learning_rate_factor(
            step,
            total_steps=settings.total_steps,
            warmup_steps=settings.warmup_steps,
            schedule=settings.lr_schedule,
        )
        set_learning_rate(self.optimizer, rate)
        clipped_update(self.optimizer, gradients, told[0], settings.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        progress = self.progress
        progress.step, progress.recorded, progress.grad_norm, progress.learning_rate = step + 1, False, norm, rate
        progress.num_tokens += int(self.task.rows.lengths[indices].sum())
        progress.window_steps += 1
        seconds = time.perf_counter() - began
        self._seconds += seconds
        self._trained += seconds
        return Ending.SIGNAL if signalled else Ending.BUDGET if overdue else None

    def _refuse(self, examples: list[tuple[Tensor, Tensor]]) -> None:
        """Stop before the update, naming the step and the rows."""
        mine = [int(row) for indices, losses in examples for row in indices[~torch.isfinite(losses.cpu())]]
        rows = sorted(row for part in gather_objects(mine) for row in part)
        which = f"the loss of dataset rows {rows[:20]}" if rows else "the gradient (every loss is finite)"
        look = "Look at these rows, lower" if rows else "Lower"
        raise NonFiniteError(
            f"step {self.progress.step + 1}: {which} is not finite; the update was not made. {look} "
            "training.learning_rate, or use training.precision=fp32"
        )

    def _window(self) -> dict[str, float]:
        """The line for this step: means over the steps since the last one, from one reduction."""
        progress = self.progress
        memory = torch.zeros(world_size(), dtype=torch.float64, device=self.device)
        memory[rank()] = self.meter.memory()  # the sum over ranks has every rank's
        told = sum_across_ranks(torch.cat([memory, self._sums])).tolist()
        metrics = self.task.metrics(told[world_size() :], self._seconds)
        metrics["grad_norm"] = progress.grad_norm
        metrics["learning_rate"] = progress.learning_rate
        metrics["epoch"] = progress.step / self.task.plan.steps_per_epoch
        metrics["num_tokens"] = progress.num_tokens
        steps = range(progress.step - progress.window_steps, progress.step)
        metrics |= self.meter.figures(steps, self._seconds, max(told[: world_size()]))
        self._sums.zero_()
        self._seconds, progress.window_steps = 0.0, 0
        return metrics

    def _global_sums(self) -> list[float]:
        return sum_across_ranks(self._sums.clone()).tolist()

    def _save(self) -> None:
        self.progress.window_sums, self.progress.window_seconds = gather_objects(self._sums.tolist()), self._seconds
        self.progress.trackers = self.tracker.state()
        self.tracker.sync(self.progress.step)
        self.checkpoints.save(self.progress, self.policy.named_parameters(), self.optimizer)


def _own_share(window_sums: list[list[float]], count: int) -> list[float]:
    """This rank's metric sums from a checkpoint; if other ranks wrote it, the first one carries them all."""
    if len(window_sums) == world_size():
        return window_sums[rank()]
    if rank() == 0 and window_sums:
        return [sum(column) for column in zip(*window_sums, strict=True)]
    return [0.0] * count
