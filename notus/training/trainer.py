"""The training loop that SFT and DPO share: `Trainer._train` shows a whole run from top to bottom.

It knows steps, rows and gradients. Pairs and losses are its task's business: see `dpo.py` and `sft.py`.
"""

import contextlib
import dataclasses
import enum
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from notus.config import TrainingConfig
from notus.data.batching import StepPlan
from notus.data.dataset import TokenizedDataset
from notus.data.packing import Batch
from notus.model.policy import Policy
from notus.model.routers import Routers
from notus.runtime.distributed import gather_objects, rank, say, sum_across_ranks, world_size
from notus.runtime.preemption import Interrupted, Stop
from notus.runtime.process import LostPeers
from notus.training.best_model import check_found, judge
from notus.training.checkpoint import Progress, step_of
from notus.training.checkpoint_writer import Checkpoints
from notus.training.dataloader import Dataloader, row_costs
from notus.training.gradient_clipping import clipped_update, gradient_norm, is_first_replica, local_gradients
from notus.training.optimizers import PiecewiseOptimizer, learning_rate_factor, set_learning_rate
from notus.training.parallelize import expect_last_row, hand_over_gradients
from notus.training.sampling import Sample
from notus.training.throughput import Meter
from notus.training.tracking import Tracker
from notus.training.warnings import Guard, Guards

_WORTH_A_LINE = 0.02  # share of a launch's time
_ROUTER_SUMS = 2  # behind the task's: the routers' loss, and of how many examples


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is not finite; the update was not made."""


class Ending(enum.Enum):
    """Why the loop ended."""

    FINISHED = "the last step is done"
    EARLY = "training.early_stopping_patience"
    SIGNAL = "a signal"
    BUDGET = "training.max_hours"


@dataclasses.dataclass
class RowLoss:
    """What one packed row adds to a step.

    Attributes:
        loss: scalar with gradient, the row's share of the step's loss: already divided by the step's global count.
        sums: fp64 [`Task.num_sums`], detached: what the row adds to the task's metrics.
        per_example: [E], detached; names the rows if the step is not finite.
    """

    loss: Tensor
    sums: Tensor
    per_example: Tensor


class Task(Protocol):
    """What is learned: SFT or DPO.

    Attributes:
        rows: the training data.
        plan: which of its examples each step takes.
        num_sums: how many sums its metrics are made of.
        guards: metrics to warn about.
    """

    rows: TokenizedDataset
    plan: StepPlan
    num_sums: int
    guards: tuple[Guard, ...]

    def prepare(self, batch: Batch) -> Batch:
        """Add what `row_loss` needs beside the row. Runs on the dataloader's thread, ahead of the step."""
        ...

    def begin_step(self, policy: Policy, step_indices: np.ndarray) -> None:
        """Find what the rows of a step must know of all of them, the examples `step_indices`. Collective."""
        ...

    def row_loss(self, policy: Policy, batch: Batch, step_indices: np.ndarray) -> RowLoss:
        """Run the policy on a row and return its loss; `step_indices`: all ranks' examples of the step."""
        ...

    def metrics(self, sums: list[float], seconds: float) -> dict[str, float]:
        """Return flat metrics from sums over steps, rows and ranks, and the wall-clock seconds they took."""
        ...

    def check_first_step(self, sums: list[float]) -> None:
        """Raise ValueError if the metric sums of a fresh run's first step show that something is wrong."""
        ...

    def evaluate(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """Return metrics on held-out data, none if there is none. Collective; calls `on_row`, which may raise."""
        ...

    def evaluate_start(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """Return what `evaluate` returns of a policy that has learned nothing yet, with less work if possible."""
        ...

    def state(self) -> dict[str, list[float]]:
        """Return what the task has learned beside the weights, for a checkpoint. Collective."""
        ...

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Continue from what `state` returned."""
        ...


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step before its update, after the step's one exchange and one host sync.

    Attributes:
        norm: fp32 scalar on the device, of the whole gradient.
        norm_value: the same, on the host.
        bad_losses: how many rows had a loss that is not finite.
        save_failed: whether a checkpoint that is written in the background failed on some rank.
        report_failed: whether a logger or a callback failed, which the first rank alone has.
        signalled: whether some rank got a signal to stop.
        overdue: whether some rank's time is used up.
    """

    norm: Tensor
    norm_value: float
    bad_losses: float
    save_failed: bool
    report_failed: bool
    signalled: bool
    overdue: bool

    @property
    def ending(self) -> Ending | None:
        """The reason to stop after this step, if there is one."""
        return Ending.SIGNAL if self.signalled else Ending.BUDGET if self.overdue else None


@dataclasses.dataclass
class Accumulated:
    """What a step's rows left on this rank.

    Attributes:
        gradients: this rank's shards.
        bad_losses: fp32 scalar on the device: rows whose loss is not finite.
        losses: per row, the dataset indices [E] of its examples and their losses [E].
    """

    gradients: list[Tensor]
    bad_losses: Tensor
    losses: list[tuple[Tensor, Tensor]]


Sampling = Callable[[Callable[[], None]], list[Sample]]


class Trainer:
    """Takes a policy from `progress` to the last step."""

    def __init__(
        self,
        policy: Policy,
        optimizer: PiecewiseOptimizer,
        task: Task,
        config: TrainingConfig,
        *,
        total_steps: int,
        progress: Progress,
        tracker: Tracker,
        checkpoints: Checkpoints,
        stop: Stop,
        meter: Meter,
        sample: Sampling | None,
        device: torch.device,
    ) -> None:
        self.policy, self.optimizer, self.task, self.config = policy, optimizer, task, config
        self.total_steps = total_steps
        self.progress, self.tracker, self.checkpoints, self.device = progress, tracker, checkpoints, device
        self.stop, self.meter, self.sample = stop, meter, sample
        progress.total_steps = total_steps
        self.trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._routers = Routers(policy.causal_lm) if config.router_aux_loss_coef else None
        # Metric sums stay on the device in fp64 until a line of metrics is due: no host sync per row.
        count = task.num_sums + (_ROUTER_SUMS if self._routers else 0)
        self._sums = torch.tensor(_own_share(progress.window_sums, count), dtype=torch.float64, device=device)
        task.load_state(progress.task)
        self._seconds = progress.window_seconds
        self._trained = 0.0  # seconds of this launch's steps
        self._guards = Guards(task.guards)
        self._failure: Exception | None = None  # of a logger or a callback, until all ranks know of it
        # one rank that holds all of the model where it computes
        self._whole = world_size() == 1 and self.trainable[0].device == device

    def run(self) -> Ending:
        """Train, log, evaluate and save until the last step, or until the run is to stop; then all is on disk."""
        self.policy.train()
        with self.stop.in_loop():
            try:
                with self._dataloader() as loader:
                    ending = self._train(loader)
            except BaseException as error:
                # a RuntimeError may mean that the other ranks are gone
                if world_size() == 1 or not isinstance(error, RuntimeError):
                    self.checkpoints.wait()  # what was saved before is worth its last bytes
                raise
            self.checkpoints.wait()
            self._report_saved()
            self._raise_failure()
        self._report_idle(loader)
        return ending

    def _train(self, loader: Dataloader) -> Ending:
        """Take the remaining steps; after each, log and evaluate, save, or stop if that is due."""
        if ending := self._before_first_step():
            return ending
        for step in range(self.progress.step, self.total_steps):
            ending = self._step(step, loader)
            if step == 0:
                self.task.check_first_step(self._global_sums())
            ending = self._record(ending)  # a signal may interrupt its evaluation
            # Saved after it is recorded, so that a resumed run does not log the step again.
            is_best = self.progress.best_step == self.progress.step
            if ending or is_best or self._due(self.config.save_every or self.task.plan.steps_per_epoch):
                self._save()
            self._report_saved()
            if ending:
                return ending
        return Ending.FINISHED

    def _before_first_step(self) -> Ending | None:
        """Evaluate and sample a fresh model, or make up for what a signal kept a resumed run from."""
        if self.progress.step == 0:
            try:
                self._evaluate_start()
                samples = self._samples()
                self._report(lambda: self.tracker.log_samples(0, samples))
            except Interrupted:
                return Ending.SIGNAL
        return self._stop_early() if self.progress.recorded else self._record(None)

    def _evaluate_start(self) -> None:
        """Log the evaluation of the model as it is before the first step."""
        if not self.config.eval_at_start:
            return
        metrics = self.task.evaluate_start(self.policy, self.stop.check)
        if not metrics:
            return
        if self.config.best_metric is not None:
            check_found(self.config.best_metric, metrics)
        self._report(lambda: self.tracker.log_initial(metrics))

    def _stop_early(self) -> Ending | None:
        """Whether so many evaluations were no better that the run is to end."""
        patience = self.config.early_stopping_patience
        return Ending.EARLY if patience and self.progress.evaluations_since_best >= patience else None

    def _step(self, step: int, loader: Dataloader) -> Ending | None:
        """Take one optimizer step; returns the reason to stop after it, if any rank has one."""
        began = time.perf_counter()
        accumulated = self._accumulate(step, loader)
        agreed = self._agree(accumulated)
        self._check(agreed, accumulated)
        self._update(step, accumulated.gradients, agreed)
        self._advance(step, time.perf_counter() - began)
        return agreed.ending  # the gradients go with this call: the next step needs their memory

    def _accumulate(self, step: int, loader: Dataloader) -> Accumulated:
        """Run every row of the step forward and backward; gradients add up in the parameters."""
        indices = self.task.plan.indices(step)
        self.task.begin_step(self.policy, indices)
        # Dropout depends on the step and the rank alone, so a resumed run draws what an undisturbed one would.
        seed = np.random.SeedSequence([self.config.seed, step, rank()])
        torch.manual_seed(seed.generate_state(1, np.uint64).item())
        bad_losses = torch.zeros((), device=self.device)
        losses: list[tuple[Tensor, Tensor]] = []
        for batch, last in loader.step():
            if self._whole:
                expect_last_row(self.policy, last)
            batch = batch.to(self.device)
            row = self._row_loss(batch, indices)
            row.loss.backward()
            self._sums += row.sums
            bad_losses += ~torch.isfinite(row.loss.detach())
            losses.append((batch.indices, row.per_example))
        if self._whole:
            hand_over_gradients(self.policy)
        return Accumulated(local_gradients(self.trainable), bad_losses, losses)

    def _row_loss(self, batch: Batch, indices: np.ndarray) -> RowLoss:
        """Run a row forward; with `router_aux_loss_coef`, the routers' loss is added, as a mean over the examples."""
        if self._routers is None:
            return self.task.row_loss(self.policy, batch, indices)
        with self._routers.reading():
            row = self.task.row_loss(self.policy, batch, indices)
        losses = self._routers.losses(batch)
        balance = (losses * batch.weights).sum()
        sums = torch.stack([balance.detach(), batch.weights.sum()]).double()
        return RowLoss(
            loss=row.loss + self.config.router_aux_loss_coef * balance / len(indices),
            sums=torch.cat([row.sums, sums]),
            per_example=row.per_example + losses.detach(),
        )

    def _agree(self, accumulated: Accumulated) -> Agreement:
        """Reduce the gradient's norm and the ranks' flags together: the step's one host sync."""
        bad_losses = accumulated.bad_losses
        mine = (self.checkpoints.failed(), self._failure is not None, self.stop.signalled, self.stop.overdue)
        # filled on the device: a copy from the host would wait for the backward pass
        flags = torch.stack([bad_losses, *(torch.full_like(bad_losses, float(raised)) for raised in mine)])
        reduced = gradient_norm(accumulated.gradients, flags, first_replica=is_first_replica(self.trainable))
        norm, bad, *raised = reduced.tolist()  # the step's one host sync
        save_failed, report_failed, signalled, overdue = map(bool, raised)
        return Agreement(reduced[0], norm, bad, save_failed, report_failed, signalled, overdue)

    def _check(self, agreed: Agreement, accumulated: Accumulated) -> None:
        """Raise what is to stop the run before the update, on all ranks: a failure, or a loss that is not finite."""
        if agreed.save_failed:
            self.checkpoints.wait()
        if agreed.report_failed:
            self._raise_failure()
        if not agreed.bad_losses and math.isfinite(agreed.norm_value):
            return
        mine = [int(row) for indices, losses in accumulated.losses for row in indices[~torch.isfinite(losses.cpu())]]
        rows = sorted(row for part in gather_objects(mine) for row in part)
        which = f"the loss of rows ({self.task.rows.places(rows)})" if rows else "the gradient (every loss is finite)"
        advice = "look at these rows, or lower training.learning_rate" if rows else "lower training.learning_rate"
        if self.config.precision != "fp32":
            advice += ", or use training.precision=fp32"
        raise NonFiniteError(
            f"step {self.progress.step + 1}: {which} is not finite; the update was not made. {advice.capitalize()}"
        )

    def _update(self, step: int, gradients: list[Tensor], agreed: Agreement) -> None:
        """Take the optimizer's step at the schedule's learning rate, with the gradient clipped."""
        factor = learning_rate_factor(
            step,
            total_steps=self.total_steps,
            warmup_steps=warmup_steps(self.config, self.total_steps),
            schedule=self.config.lr_schedule,
            floor=self.config.min_lr_ratio,
            decay_steps=math.ceil(self.config.decay_ratio * self.total_steps),
        )
        self.progress.learning_rate = self.config.learning_rate * factor
        self.progress.grad_norm = agreed.norm_value
        set_learning_rate(self.optimizer, self.progress.learning_rate)
        clipped_update(self.optimizer, gradients, agreed.norm, self.config.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)

    def _advance(self, step: int, seconds: float) -> None:
        """Count the step, which has not been logged yet."""
        self.progress.step, self.progress.recorded = step + 1, False
        self.progress.num_tokens += int(self.task.rows.lengths[self.task.plan.indices(step)].sum())
        self.progress.window_steps += 1
        self._seconds += seconds
        self._trained += seconds

    def _record(self, ending: Ending | None) -> Ending | None:
        """Log and evaluate if that is due at this step; returns the reason to stop, if there is one by now."""
        evaluate = self._due(self.config.eval_every)
        if evaluate and ending is not None:
            return ending  # the next launch evaluates
        if evaluate or self._due(self.config.log_every):
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
            self._report(lambda: self.tracker.log(self.progress.step, {**metrics, **held_out}))
            self._report(lambda: self.tracker.log_samples(self.progress.step, samples))
            self.progress.logged = self.progress.step
            if held_out and self.config.best_metric is not None:
                # as the first rank has them, so that all decide alike
                judge(self.progress, self.config.best_metric, gather_objects(held_out)[0])
                ending = self._stop_early()
        self.progress.recorded = True
        return ending

    def _due(self, every: int | None) -> bool:
        step = self.progress.step
        return step == self.total_steps or (every is not None and step % every == 0)

    def _samples(self) -> list[Sample]:
        return self.sample(self.stop.check) if self.sample else []

    def _window(self) -> dict[str, float]:
        """The metrics of the steps since the last line of metrics, from one reduction."""
        progress, ranks = self.progress, world_size()
        memory = torch.zeros(ranks, dtype=torch.float64, device=self.device)
        memory[rank()] = self.meter.memory()  # the sum over ranks has every rank's
        reduced = sum_across_ranks(torch.cat([memory, self._sums])).tolist()
        own = reduced[ranks : ranks + self.task.num_sums]
        metrics = self.task.metrics(own, self._seconds)
        if self._routers is not None:
            balance, examples = reduced[ranks + self.task.num_sums :]
            metrics["router_aux_loss"] = balance / examples
        metrics["grad_norm"] = progress.grad_norm
        metrics["learning_rate"] = progress.learning_rate
        metrics["epoch"] = progress.step / self.task.plan.steps_per_epoch
        metrics["num_tokens"] = progress.num_tokens
        steps = range(progress.step - progress.window_steps, progress.step)
        metrics |= self.meter.figures(steps, self._seconds, max(reduced[:ranks]))
        self._sums.zero_()
        self._seconds, progress.window_steps = 0.0, 0
        return metrics

    def _global_sums(self) -> list[float]:
        return sum_across_ranks(self._sums[: self.task.num_sums].clone()).tolist()

    def _save(self) -> None:
        self._report(lambda: self.tracker.sync(self.progress.step))
        self.checkpoints.wait()
        self._report_saved()  # the next one may replace it
        self._raise_failure()  # what was not logged is not in a checkpoint either
        # The sums since the last line go with the checkpoint, so that the next line is that of an undisturbed run.
        self.progress.window_sums, self.progress.window_seconds = gather_objects(self._sums.tolist()), self._seconds
        self.progress.task = self.task.state()
        self.progress.trackers = self.tracker.state()
        self.checkpoints.save(self.progress, self.policy.named_parameters(), self.optimizer)

    def _report_saved(self) -> None:
        for path in self.checkpoints.completed():
            self._report(functools.partial(self.tracker.saved, step_of(path), path))

    def _report(self, work: Callable[[], None]) -> None:
        """Let the loggers and the callbacks do something; nothing more after one of them has failed.

        The first rank alone has them. If it raised here, the others would wait for it in their next exchange until
        that times out. So it takes part in that exchange, where they learn of it.
        """
        if self._failure is not None:
            return
        try:
            work()
        except Exception as error:
            if world_size() == 1:
                raise
            self._failure = error

    def _raise_failure(self) -> None:
        """Raise on every rank what a logger or a callback raised on the first one, if that happened. Collective."""
        failure = self._failure
        message = None
        if failure is not None:
            known = isinstance(failure, ValueError | OSError)
            message = str(failure) if known else f"rank 0 ended: {type(failure).__name__}: {failure}"
        message = gather_objects(message)[0]
        if message is None:
            return
        with contextlib.suppress(OSError):
            self.checkpoints.wait()  # all ranks write it, and none may leave before
        raise failure or LostPeers(message, speaker=0)

    def _dataloader(self) -> Dataloader:
        task = self.task
        return Dataloader(
            task.rows,
            row_costs(self.policy, task.rows),
            task.plan,
            range(self.progress.step, self.total_steps),
            tokens_per_row=self.config.tokens_per_row,
            device=self.device,
            prepare=task.prepare,
        )

    def _report_idle(self, loader: Dataloader) -> None:
        """Log what share of this launch was spent waiting for data, if it matters, and for other ranks; collective."""
        waited = max(gather_objects(loader.waited / self._trained if self._trained else 0.0))
        if waited >= _WORTH_A_LINE:
            say(f"training waited for data for {waited:.1%} of the time: the CPU makes rows too slowly")
        if world_size() > 1:
            say(f"ranks waited for the slowest one for {loader.idle_share:.2%} of the time (estimated from their rows)")


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Return the steps in which the learning rate rises: as configured, or a share of all steps, rounded up."""
    return math.ceil(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps


def _own_share(window_sums: list[list[float]], count: int) -> list[float]:
    """This rank's metric sums from a checkpoint; if other ranks wrote it, the first one carries them all."""
    found: list[float] = []
    if len(window_sums) == world_size():
        found = window_sums[rank()]
    elif rank() == 0 and window_sums:
        found = [sum(column) for column in zip(*window_sums, strict=True)]
    # the routers' sums come last: a run that is resumed with or without their loss has more or fewer
    return [*found, *[0.0] * count][:count]
