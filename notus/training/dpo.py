"""DPO: what a step is, and the run around it."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from notus.config import Config, DPOConfig
from notus.data.batching import StepPlan
from notus.data.dataset import TokenizedDataset
from notus.data.packing import Batch
from notus.model.policy import Policy
from notus.runtime.distributed import say
from notus.training.objective import PairObjective, Scored, Totals
from notus.training.reference import ReferenceKey, digest_of_rows, reference_logps
from notus.training.run_folder import REFERENCE
from notus.training.scoring import score
from notus.training.setup import Run, start
from notus.training.trainer import RowLoss

# By how much ln 2 may be missed at step 0: policy and reference differ by rounding alone, but rows are packed
# differently in the reference pass, and matrix products of another shape may round differently. In bf16 that moves a
# log-prob by about 0.03 nats per square root of its tokens (simulated, logits of standard deviation 3), so the mean
# loss by 0.05 * 0.03 * sqrt(tokens) / pairs; five times that is let pass.
FIRST_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
_BF16_NOISE = 5 * 0.05 * 0.03


@dataclasses.dataclass
class Preferences:
    """Tokenised rows with what their loss needs beside their tokens.

    Attributes:
        rows: n rows of K completions.
        reference: fp32 [n, K] in nats, the reference's log-probs; None: the loss has no reference.
        ratings: fp32 [n, K], where the loss needs them.
    """

    rows: TokenizedDataset
    reference: Tensor | None
    ratings: Tensor | None = None

    def totals(self, indices: np.ndarray) -> Totals:
        """What the rows of a step are divided by."""
        return Totals(len(indices), int(self.rows.loss_tokens[indices, 0].sum()))

    def scored(self, indices: np.ndarray, policy: Tensor) -> Scored:
        """These rows with the policy's log-probs of them, fp32 [m, K] on the host."""
        return Scored(
            policy=policy,
            reference=_at(self.reference, indices),
            lengths=torch.from_numpy(self.rows.loss_tokens[indices]),
            weights=torch.ones(len(indices)),
            ratings=_at(self.ratings, indices),
        )


def _at(values: Tensor | None, indices: np.ndarray) -> Tensor | None:
    return None if values is None else values[torch.from_numpy(indices)]


class DPOTask:
    """The preference loss on packed rows, against cached reference log-probs if it has a reference."""

    _start_checked = False

    def __init__(
        self,
        train: Preferences,
        held_out: Preferences | None,
        *,
        plan: StepPlan,
        config: DPOConfig,
        precision: str,
        tokens_per_row: int,
        device: torch.device,
    ) -> None:
        self.rows, self.plan = train.rows, plan
        self._train, self._held_out = train, held_out
        self._objective = PairObjective(config)
        self._precision, self._tokens_per_row, self._device = precision, tokens_per_row, device
        self.num_sums, self.guards = self._objective.num_sums, self._objective.guards

    def prepare(self, batch: Batch) -> Batch:
        """Add what the loss needs of the row; of a filler that of any row, since it weighs nothing."""
        indices = batch.indices.numpy()
        return dataclasses.replace(
            batch, reference=_at(self._train.reference, indices), ratings=_at(self._train.ratings, indices)
        )

    def row_loss(self, policy: Policy, batch: Batch, step_indices: np.ndarray) -> RowLoss:
        """The row's share of: mean loss over the step's examples + nll_weight * mean NLL of its chosen answers."""
        rows = Scored(policy(batch), batch.reference, batch.lengths, batch.weights, batch.ratings)
        outcome = self._objective(rows, self._train.totals(step_indices))
        return RowLoss(
            loss=(outcome.losses * batch.weights).sum() / len(step_indices),
            sums=self._objective.sums(rows, outcome),
            per_example=outcome.losses.detach(),
        )

    def metrics(self, sums: list[float], seconds: float) -> dict[str, float]:
        """Means over examples, and the speed."""
        metrics = self._objective.metrics(sums)
        if seconds:
            metrics["pairs_per_second"] = self._objective.read(sums).examples / seconds
        return metrics

    def check_first_step(self, sums: list[float]) -> None:
        """Policy and reference are one model at step 0, so the sigmoid loss is ln 2, whichever loss is trained.

        Raises:
            ValueError: it is not.
        """
        if self._start_checked or not self._objective.reference:
            return
        total, tolerance = self._objective.read(sums), FIRST_LOSS_TOLERANCE[self._precision]
        found = total.sigmoid_loss / total.examples
        if self._precision == "bf16":
            tolerance = max(tolerance, _BF16_NOISE * math.sqrt(total.chosen_tokens) / total.examples)
        if not abs(found - math.log(2)) <= tolerance:
            raise ValueError(
                f"at step 0 the sigmoid loss is {found:.6f}, not ln 2 = {math.log(2):.6f} (tolerance {tolerance:g}): "
                "policy and reference log-probs disagree before training. Delete the reference cache; if it happens "
                "again, the attention kernel or the precision differs between the two passes"
            )

    def check_start(self, policy: Policy) -> None:
        """Make the check of `check_first_step` now, by a pass without dropout; collective.

        Dropout changes what a trained adapter adds: the loss of the first step itself is not ln 2 then.
        """
        if self._objective.reference:
            self.check_first_step(self._pass(policy, self._train, self.plan.indices(0)))
        self._start_checked = True

    def evaluate(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """Loss, rewards and log-probs on the held-out rows, under `eval_` names."""
        held_out = self._held_out
        if held_out is None:
            return {}
        sums = self._pass(policy, held_out, np.arange(len(held_out.rows)), on_row)
        return {f"eval_{name}": value for name, value in self.metrics(sums, 0.0).items()}

    def _pass(
        self, policy: Policy, data: Preferences, indices: np.ndarray, on_row: Callable[[], None] | None = None
    ) -> list[float]:
        """The metric sums of some rows, by a pass without dropout; collective."""
        logps = score(
            policy, data.rows, indices, tokens_per_row=self._tokens_per_row, device=self._device, on_row=on_row
        )
        rows = data.scored(indices, logps)
        found: list[float] = self._objective.sums(rows, self._objective(rows, data.totals(indices))).tolist()
        return found


def run(config: Config) -> int:
    """Train with DPO as `config` says: `train_dpo.py`.

    Returns:
        The exit code: 0, or `notus.runtime.process.STOPPED` if a signal ended the run before its last step.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    with start(config, "dpo") as job:
        return 0 if job is None else job.train(build_task(job, config))


def fill_reference(config: Config) -> None:
    """Fill the reference cache of `config` and stop: `python -m notus reference`.

    Raises:
        ValueError: a user's mistake, in one line; also a loss without a reference.
    """
    if not PairObjective(config.dpo).reference:
        raise ValueError(f"dpo.loss_type {config.dpo.loss_type!r} has no reference: there is nothing to compute")
    with start(config, "dpo", train=False) as job:
        assert job is not None
        for name, rows in (("train", job.train_rows), ("eval", job.eval_rows)):
            if rows is not None:
                _with_reference(job, config, name, rows)


def build_task(job: Run, config: Config) -> DPOTask:
    """The task of a run: its pairs, with the reference log-probs read or computed here; collective."""
    objective = PairObjective(config.dpo)
    if not objective.reference:
        say(f"dpo.loss_type {config.dpo.loss_type!r} has no reference: no reference pass, and no cache")
    task = DPOTask(
        _preferences(job, config, "train", job.train_rows, objective),
        None if job.eval_rows is None else _preferences(job, config, "eval", job.eval_rows, objective),
        plan=job.plan,
        config=config.dpo,
        precision=config.training.precision,
        tokens_per_row=config.training.tokens_per_row,
        device=job.device,
    )
    if config.lora.continue_ and config.lora.dropout:
        task.check_start(job.policy)
    return task


def _preferences(job: Run, config: Config, name: str, rows: TokenizedDataset, objective: PairObjective) -> Preferences:
    """Rows of "train" or "eval" with what their loss needs."""
    reference = _with_reference(job, config, name, rows) if objective.reference else None
    return Preferences(rows, reference)


def _with_reference(job: Run, config: Config, name: str, rows: TokenizedDataset) -> Tensor:
    """The reference's log-probs, fp32 [n, K], from the cache or by a pass of the untrained policy."""
    digests = rows.digests()
    key = ReferenceKey(
        weights=job.weights_digest,
        rows=digest_of_rows(digests),
        precision=config.training.precision,
        kernel=job.kernel,
    )
    folder = Path(config.reference.cache_dir or Path(config.training.output_dir) / REFERENCE)

    def pass_over(indices: np.ndarray) -> Tensor:
        logps = score(job.policy, rows, indices, tokens_per_row=config.training.tokens_per_row, device=job.device)
        say(f"reference log-probs: {indices[-1] + 1}/{len(rows)}")
        return logps

    try:
        logps, read = reference_logps(pass_over, rows, key=key, digests=digests, folder=folder)
    except OSError as error:
        raise ValueError(
            f"the reference cache cannot be kept in {folder} ({error}): set reference.cache_dir"
        ) from error
    job.identity[f"reference.{name}"] = key.name
    say(f"reference log-probs: {len(rows)} rows {'read from' if read else 'written to'} {folder / key.name}")
    return logps
